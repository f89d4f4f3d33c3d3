"""Adapters made by PEFT itself, one for every feature whose result is defined, over tiny random bases.

Every trained tensor is random and far from its initial value, so a part that is forgotten, transposed or scaled
wrongly moves the logits by much more than the tolerance of the comparisons.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora.config import EvaConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specstream_convert import ConvertOptions, convert
from specstream_convert.torch_reference.testing import write_tiny_base
from specstream_convert.verify import output_logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
WITH_BIASES = ("qwen2",)  # families whose adapted layers have biases
ONE = ("llama",)  # for what does not depend on the family: initialisations, ways to save
RESIZED = 101
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
ROWS = [88, 3, 60]  # token ids, not in order
ATOL = 1e-4  # logits are around 3, both sides sum in float32 in another order
ADAPTER = "adapter_model.safetensors"
Settings = dict[str, Any]
Array = np.ndarray[Any, Any]


def targets(family: str) -> list[str]:
    """Linear layers of attention and MLP; the fused ones where the family fuses."""
    return ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "down_proj"]


def save(model: Any, directory: Path) -> Path:
    """As PEFT saves it."""
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Feature:
    """One way to use PEFT.

    Attributes:
        settings: of LoraConfig, given the family.
        ties: whether the base ties its embeddings.
        live: whether ``--keep-adapters`` has an exact form.
        resize: the vocabulary is resized before PEFT is applied.
        write: model, directory -> the path to convert.
        options: of the conversion.
    """

    name: str
    settings: Callable[[str], Settings] = lambda family: {}
    ties: tuple[bool, ...] = (False,)
    families: tuple[str, ...] = FAMILIES
    live: bool = True
    resize: bool = False
    write: Callable[[Any, Path], Path] = save
    options: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A saved adapter, its base, and what PEFT computes with both."""

    feature: Feature
    base: Path
    adapter: Path
    logits: Array  # (L, V)

    def convert(self, out: Path, **options: Any) -> Any:
        """Convert; the report."""
        settings: Settings = {"adapter_path": self.adapter, "mlx_path": out, "hf_path": str(self.base)}
        return convert(ConvertOptions(**(settings | {"lora_only": True} | self.feature.options | options)))

    def difference(self, out: Path, *, fuse: bool) -> float:
        """Convert merged or live; the largest difference of a logit."""
        report = self.convert(out, fuse=fuse)
        live = report.placement == "live"
        return float(np.abs(output_logits(out, np.array(TOKENS), live=live) - self.logits).max())


class Bases:
    """Tiny bases of every family, written once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[Path, Any] = {}

    def path(self, family: str, tie: bool) -> Path:
        """The directory of a base."""
        path = self._root / f"{family}-{'tied' if tie else 'untied'}"
        if not path.exists():
            with quiet():
                write_tiny_base(family, path, hidden_size=32, num_layers=2, tie_word_embeddings=tie)
        return path

    def model(self, family: str, tie: bool) -> Any:
        """A base as PyTorch has it, float32, a fresh copy."""
        path = self.path(family, tie)
        if path not in self._models:
            with quiet():
                self._models[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return copy.deepcopy(self._models[path])

    def save(self, feature: Feature, family: str, tie: bool, directory: Path) -> Saved:
        """Put PEFT on a base, give everything trained random values, and save the adapter."""
        with quiet():
            model = self.model(family, tie)
            if feature.resize:
                torch.manual_seed(0)
                model.resize_token_embeddings(RESIZED, mean_resizing=False)
            settings: Settings = {"r": 4, "lora_alpha": 6, "target_modules": targets(family), "task_type": "CAUSAL_LM"}
            model = peft.get_peft_model(model, peft.LoraConfig(**(settings | feature.settings(family))))
            if feature.settings(family).get("init_lora_weights") == "eva":
                batches = [{"input_ids": torch.tensor([TOKENS])}]
                peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
            randomise(model)
            path = feature.write(model, directory)
            model.eval()
            with torch.no_grad():
                logits = model(torch.tensor([TOKENS])).logits[0].float().numpy()
        return Saved(feature, self.path(family, tie), path, logits)


@contextlib.contextmanager
def quiet() -> Any:
    """Without the warnings and progress bars of transformers and PEFT."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def randomise(model: Any, seed: int = 1) -> None:
    """Random values for everything trained; DoRA's magnitudes and norms stay positive, rows keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if ".lora_" in name and "magnitude" not in name:
                parameter.copy_(0.2 * noise)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise.clamp(-2, 2))
            else:
                parameter.add_(0.3 * parameter.std() * noise if parameter.std() > 0 else 0.2 * noise)


# How adapters are written other than by save_pretrained


def _in_checkpoint(model: Any, directory: Path) -> Path:
    """As the Trainer does: a numbered directory with its own files, pickles among them."""
    save(model, directory / "checkpoint-7")
    torch.save({"x": torch.zeros(1)}, directory / "checkpoint-7" / "optimizer.pt")
    (directory / "checkpoint-7" / "training_args.bin").write_bytes(b"\x80\x02.")
    return directory


def _named(model: Any, directory: Path) -> Path:
    """Under an adapter name of its own: a sub-directory."""
    model.add_adapter("sql", model.peft_config["default"])
    model.set_adapter("sql")
    randomise(model, seed=2)
    model.save_pretrained(directory, selected_adapters=["sql"])
    return directory


def _raw(model: Any, directory: Path, rename: Callable[[str], str] = lambda name: name) -> Path:
    """The trained part of ``state_dict()`` under its own names, untrained copies of saved modules too."""
    save(model, directory)
    (directory / ADAPTER).unlink()
    parts = ("lora_", "modules_to_save", "original_module", "trainable_tokens_delta")
    kept = {name: value for name, value in model.state_dict().items() if any(part in name for part in parts)}
    save_file({rename(name): value.clone() for name, value in kept.items()}, directory / ADAPTER)
    return directory


def _raw_with_prefixes(model: Any, directory: Path) -> Path:
    """As saved from under DDP, torch.compile and FSDP at once."""

    def rename(name: str) -> str:
        return "module._orig_mod." + name.replace(".layers.", "._fsdp_wrapped_module.layers.")

    return _raw(model, directory, rename)


def _several_in_a_file(model: Any, directory: Path) -> Path:
    """Two adapters in one file; the second is the trained one."""
    model.add_adapter("sql", model.peft_config["default"])
    model.set_adapter("sql")
    randomise(model, seed=2)
    return _raw(model, directory)


def _mixed_dtypes(model: Any, directory: Path) -> Path:
    """A in bfloat16, B in float16 and float32; the model computes with what was saved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(parameter.bfloat16())
            elif ".lora_B." in name and ".0." in name:
                parameter.copy_(parameter.half())
    save(model, directory)
    tensors = load_file(directory / ADAPTER)
    for name, value in tensors.items():
        if ".lora_A." in name:
            tensors[name] = value.bfloat16()
        elif ".lora_B." in name and ".0." in name:
            tensors[name] = value.half()
    save_file(tensors, directory / ADAPTER)
    return directory


# What is compared with PEFT


def _always(**settings: Any) -> Callable[[str], Settings]:
    return lambda family: settings


def _also(*modules: str, **settings: Any) -> Callable[[str], Settings]:
    return lambda family: {"target_modules": [*targets(family), *modules], **settings}


def _patterns(**settings: Any) -> Callable[[str], Settings]:
    """Overlapping keys, the first that fits counts; in alphabetical order, in which PEFT saves them."""

    def patterns(family: str) -> Settings:
        first = targets(family)[0]
        return {
            "rank_pattern": {"down_proj": 6, f"layers.1.self_attn.{first}": 3, first: 5},
            "alpha_pattern": {r"layers\.[0].mlp.*": 20, "mlp.down_proj": 2},
            **settings,
        }

    return patterns


BOTH = (False, True)
EMBEDDING, HEAD = "embed_tokens", "lm_head"
FEATURES = (
    Feature("LoRA", ties=BOTH),
    Feature("rsLoRA", _always(use_rslora=True)),
    Feature("rank_pattern, alpha_pattern", _patterns()),
    Feature("patterns with rsLoRA", _patterns(use_rslora=True)),
    Feature("layers_to_transform", _always(layers_to_transform=[1], layers_pattern="layers")),
    Feature("target_modules as a regex", _always(target_modules=r".*\.1\..*(qkv|q|down)_proj")),
    Feature("target_modules all-linear", _always(target_modules="all-linear")),
    Feature("exclude_modules", _always(exclude_modules=["layers.0.mlp.down_proj"])),
    Feature("init gaussian", _always(init_lora_weights="gaussian"), families=ONE),
    Feature("init orthogonal", _always(init_lora_weights="orthogonal"), families=ONE),
    Feature("init EVA", _always(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)), families=ONE),
    Feature("init MiCA", _always(init_lora_weights="mica"), families=ONE),
    Feature("init PiSSA", _always(init_lora_weights="pissa"), families=ONE, options={"recompute_init": True}),
    Feature("init OLoRA", _always(init_lora_weights="olora"), families=ONE, options={"recompute_init": True}),
    Feature(
        "init PiSSA with DoRA",
        _always(init_lora_weights="pissa", use_dora=True),
        families=ONE,
        options={"recompute_init": True},
    ),
    Feature("VeLoRA", _always(velora_config=VeloraConfig(num_groups=4)), families=ONE),
    Feature("DoRA", _always(use_dora=True), ties=BOTH),
    Feature("DoRA with rsLoRA and patterns", _patterns(use_dora=True, use_rslora=True)),
    Feature("DoRA of the LM head", _also(HEAD, use_dora=True), ties=BOTH),
    Feature("DoRA of the embedding", _also(EMBEDDING, use_dora=True), ties=BOTH, live=False),
    Feature("LoRA of the embedding", _also(EMBEDDING), ties=BOTH),
    Feature("LoRA of the LM head", _also(HEAD), ties=BOTH),
    Feature("LoRA of embedding and LM head", _also(EMBEDDING, HEAD), ties=BOTH),
    Feature("LoRA of the embedding, ensure_weight_tying", _also(EMBEDDING, ensure_weight_tying=True), ties=(True,)),
    Feature("LoRA of the LM head, ensure_weight_tying", _also(HEAD, ensure_weight_tying=True), ties=(True,)),
    Feature("lora_bias", _always(lora_bias=True, target_modules=["q_proj", "v_proj"]), families=WITH_BIASES),
    Feature("bias all", _always(bias="all"), families=WITH_BIASES),
    Feature("bias lora_only", _always(bias="lora_only"), families=WITH_BIASES),
    Feature(
        "bias lora_only with lora_bias",
        _always(bias="lora_only", lora_bias=True, target_modules=["q_proj", "v_proj"]),
        families=WITH_BIASES,
    ),
    Feature("modules_to_save embedding", _always(modules_to_save=[EMBEDDING]), ties=BOTH),
    Feature("modules_to_save LM head", _always(modules_to_save=[HEAD]), ties=BOTH),
    Feature("modules_to_save both", _always(modules_to_save=[EMBEDDING, HEAD]), ties=BOTH),
    Feature(
        "modules_to_save embedding, ensure_weight_tying",
        _always(modules_to_save=[EMBEDDING], ensure_weight_tying=True),
        ties=(True,),
    ),
    Feature("modules_to_save norms", _always(modules_to_save=["norm"])),
    Feature("modules_to_save a linear layer", _always(modules_to_save=["o_proj"])),
    Feature("modules_to_save a whole block", _always(modules_to_save=["mlp"], target_modules=r".*self_attn.*_proj")),
    Feature("modules_to_save with LoRA of the LM head", _also(HEAD, modules_to_save=[EMBEDDING]), ties=BOTH),
    Feature("resized vocabulary", resize=True, ties=BOTH),
    Feature("resized, modules_to_save both", _always(modules_to_save=[EMBEDDING, HEAD]), resize=True, ties=BOTH),
    Feature("resized, LoRA of embedding and LM head", _also(EMBEDDING, HEAD), resize=True, ties=BOTH),
    Feature("resized, LoRA of the tied embedding", _also(EMBEDDING), resize=True, ties=(True,)),
    Feature("trainable_token_indices", _always(trainable_token_indices=ROWS), ties=BOTH),
    Feature("trainable_token_indices by module", _always(trainable_token_indices={EMBEDDING: ROWS}), ties=BOTH),
    Feature(
        "trainable_token_indices of both",
        _always(trainable_token_indices={EMBEDDING: ROWS, HEAD: [9, 60]}),
        ties=BOTH,
    ),
    Feature(
        "trainable_token_indices of both, the same",
        _always(trainable_token_indices={EMBEDDING: ROWS, HEAD: ROWS}),
        ties=BOTH,
    ),
    Feature("trainable_token_indices, LoRA of the LM head", _also(HEAD, trainable_token_indices=ROWS), ties=BOTH),
    Feature(
        "trainable_token_indices, modules_to_save LM head",
        _always(trainable_token_indices=ROWS, modules_to_save=[HEAD]),  # PEFT cannot run it on a tied base
    ),
    Feature("resized, trainable_token_indices", _always(trainable_token_indices=[99, 98, 3]), resize=True, ties=BOTH),
    Feature("adapter in a sub-directory", write=_named, families=ONE),
    Feature("Trainer's checkpoint-N", write=_in_checkpoint, families=ONE),
    Feature("raw state_dict", _always(use_dora=True), write=_raw, families=ONE),
    Feature("raw state_dict, modules_to_save", _always(modules_to_save=["norm", HEAD]), write=_raw, families=ONE),
    Feature(
        "raw state_dict, trainable_token_indices",
        _always(trainable_token_indices=ROWS),
        write=_raw,
        ties=BOTH,
        families=ONE,
    ),
    Feature("raw state_dict, LoRA of the embedding", _also(EMBEDDING), write=_raw, families=ONE),
    Feature(
        "raw state_dict under DDP, compile and FSDP",
        _always(modules_to_save=["norm"]),
        write=_raw_with_prefixes,
        families=ONE,
    ),
    Feature("several adapters in a file", write=_several_in_a_file, options={"adapter_name": "sql"}, families=ONE),
    Feature("bfloat16, float16 and float32 mixed", write=_mixed_dtypes, families=ONE),
)


def variants() -> list[tuple[Feature, str, bool]]:
    """Every feature with every family and tie for which it makes sense."""
    return [(f, family, tie) for f in FEATURES for family in f.families for tie in f.ties]


def label(feature: Feature, tie: bool) -> str:
    """The feature's row in the table."""
    return f"{feature.name}, {'tied' if tie else 'untied'}" if len(feature.ties) > 1 else feature.name
