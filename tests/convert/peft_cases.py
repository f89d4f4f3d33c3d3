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
from specstream_convert.verification.forward import output_logits
from specstream_torch.testing import write_tiny_base
from tests.tolerances import LOGITS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2")
WITH_BIASES = ("qwen2", "opt", "gpt2")  # families whose adapted layers have biases
LIKE_LLAMA = ("mistral", "qwen2", "qwen3")
ONE = ("llama",)  # for what does not depend on the family: initialisations, ways to save
UNTIABLE = tuple(family for family in FAMILIES if family != "gpt2")  # may have an LM head of their own
RESIZED = 101
TOKENS = [5, 17, 3, 88, 40, 41, 2, 9, 60, 33]
ROWS = [88, 3, 60]  # token ids, not in order
ATOL = LOGITS
ADAPTER = "adapter_model.safetensors"
Settings = dict[str, Any]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Names:
    """What a family calls its parts; attention, then MLP, in ``linear``."""

    linear: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
    embedding: str = "embed_tokens"
    output: str = "o_proj"  # of attention
    norms: tuple[str, ...] = ("norm",)
    block: str = "mlp"
    layers: str = "layers"
    attention: str = "self_attn"


NAMES = {
    "phi3": Names(linear=("qkv_proj", "down_proj")),
    "opt": Names(linear=("q_proj", "v_proj", "fc2"), output="out_proj", norms=("layer_norm",), block="fc1"),
    "gpt2": Names(
        linear=("c_attn", "mlp.c_proj"),
        embedding="wte",
        output="attn.c_proj",
        norms=("ln_1", "ln_2", "ln_f"),
        layers="h",
        attention="attn",
    ),
}
HEAD = "lm_head"


def names(family: str) -> Names:
    """The parts of a family; those of llama when it has no others."""
    return NAMES.get(family, Names())


def targets(family: str) -> list[str]:
    """Linear layers of attention and MLP; the fused ones where the family fuses."""
    return list(names(family).linear)


def biased(family: str) -> list[str]:
    """The linear layers that have a bias: all but qwen2's MLP."""
    return ["q_proj", "v_proj"] if family == "qwen2" else targets(family)


def excluded(family: str) -> str:
    """The last of the linear layers by its path within a layer."""
    last = names(family).linear[-1]
    return last if family in ("opt", "gpt2") else f"mlp.{last}"


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
        apart: a tied base's LM head and embedding end up with values of their own.
        resize: the vocabulary is resized before PEFT is applied.
        write: model, directory -> the path to convert.
        options: of the conversion.
    """

    name: str
    settings: Callable[[str], Settings] = lambda family: {}
    ties: tuple[bool, ...] = (False,)
    families: tuple[str, ...] = FAMILIES
    live: bool = True
    apart: bool = False
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
            settings["fan_in_fan_out"] = family == "gpt2"
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


EMBEDDING = object()  # stands for the family's own name


def _named_in(family: str, value: Any) -> Any:
    """``value`` with the family's name of its embedding."""
    if isinstance(value, dict):
        return {_named_in(family, key): item for key, item in value.items()}
    if isinstance(value, list):
        return [_named_in(family, item) for item in value]
    return names(family).embedding if value is EMBEDDING else value


def _set(**settings: Any) -> Callable[[str], Settings]:
    return lambda family: {key: _named_in(family, value) for key, value in settings.items()}


def _also(*modules: Any, **settings: Any) -> Callable[[str], Settings]:
    """LoRA of more modules than the usual ones."""
    return lambda family: _set(target_modules=[*targets(family), *modules], **settings)(family)


def _patterns(**settings: Any) -> Callable[[str], Settings]:
    """Overlapping keys, the first that fits counts; in alphabetical order, in which PEFT saves them."""

    def patterns(family: str) -> Settings:
        part = names(family)
        first, last = part.linear[0], part.linear[-1]
        one, any_layer = rf"{part.layers}\.1\.", rf"{part.layers}\.\d\."
        return {
            "rank_pattern": {last: 6, rf"{one}{part.attention}.{first}": 3, rf"{any_layer}.*{first}": 5},
            "alpha_pattern": {rf"{part.layers}\.[0]\..*{last}": 20, rf"{any_layer}.*{last}": 2},
            **settings,
        }

    return patterns


BOTH = (False, True)
FEATURES = (
    Feature("LoRA", ties=BOTH),
    Feature("rsLoRA", _set(use_rslora=True)),
    Feature("rank_pattern, alpha_pattern", _patterns()),
    Feature("patterns with rsLoRA", _patterns(use_rslora=True)),
    Feature("layers_to_transform", lambda f: {"layers_to_transform": [1], "layers_pattern": names(f).layers}),
    Feature("target_modules as a regex", _set(target_modules=r".*\.1\..*(qkv_proj|q_proj|down_proj|fc2|c_attn)")),
    Feature("target_modules all-linear", _set(target_modules="all-linear")),
    Feature("exclude_modules", lambda f: {"exclude_modules": [f"{names(f).layers}.0.{excluded(f)}"]}),
    Feature("init gaussian", _set(init_lora_weights="gaussian"), families=ONE),
    Feature("init orthogonal", _set(init_lora_weights="orthogonal"), families=ONE),
    Feature("init EVA", _set(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)), families=ONE),
    Feature("init MiCA", _set(init_lora_weights="mica"), families=ONE),
    Feature("init PiSSA", _set(init_lora_weights="pissa"), families=ONE, options={"recompute_init": True}),
    Feature("init OLoRA", _set(init_lora_weights="olora"), families=ONE, options={"recompute_init": True}),
    Feature(
        "init PiSSA with DoRA",
        _set(init_lora_weights="pissa", use_dora=True),
        families=ONE,
        options={"recompute_init": True},
    ),
    Feature("VeLoRA", _set(velora_config=VeloraConfig(num_groups=4)), families=ONE),
    Feature("DoRA", _set(use_dora=True), ties=BOTH),
    Feature("DoRA with rsLoRA and patterns", _patterns(use_dora=True, use_rslora=True)),
    Feature("DoRA of the LM head", _also(HEAD, use_dora=True), ties=BOTH, apart=True),
    Feature("DoRA of the embedding", _also(EMBEDDING, use_dora=True), ties=BOTH, live=False, apart=True),
    Feature("LoRA of the embedding", _also(EMBEDDING), ties=BOTH, apart=True),
    Feature("LoRA of the LM head", _also(HEAD), ties=BOTH, apart=True),
    Feature("LoRA of embedding and LM head", _also(EMBEDDING, HEAD), ties=BOTH, apart=True),
    Feature(
        "LoRA of the embedding, ensure_weight_tying",
        _also(EMBEDDING, ensure_weight_tying=True),
        ties=(True,),
        families=UNTIABLE,
    ),
    Feature("LoRA of the LM head, ensure_weight_tying", _also(HEAD, ensure_weight_tying=True), ties=(True,)),
    Feature("lora_bias", lambda f: {"lora_bias": True, "target_modules": biased(f)}, families=WITH_BIASES),
    Feature("bias all", _set(bias="all"), families=WITH_BIASES),
    Feature("bias lora_only", _set(bias="lora_only"), families=WITH_BIASES),
    Feature(
        "bias lora_only with lora_bias",
        lambda f: {"bias": "lora_only", "lora_bias": True, "target_modules": biased(f)},
        families=WITH_BIASES,
    ),
    Feature("modules_to_save embedding", _set(modules_to_save=[EMBEDDING]), ties=BOTH, apart=True),
    Feature("modules_to_save LM head", _set(modules_to_save=[HEAD]), ties=BOTH, apart=True),
    Feature("modules_to_save both", _set(modules_to_save=[EMBEDDING, HEAD]), ties=BOTH, apart=True),
    Feature(
        "modules_to_save embedding, ensure_weight_tying",
        _set(modules_to_save=[EMBEDDING], ensure_weight_tying=True),
        ties=(True,),
        families=UNTIABLE,
    ),
    Feature("modules_to_save norms", lambda f: {"modules_to_save": list(names(f).norms)}),
    Feature("modules_to_save a linear layer", lambda f: {"modules_to_save": [names(f).output]}),
    Feature(
        "modules_to_save a whole block",
        lambda f: {"modules_to_save": [names(f).block], "target_modules": [names(f).linear[0]]},
    ),
    Feature(
        "modules_to_save with LoRA of the LM head",
        _also(HEAD, modules_to_save=[EMBEDDING]),
        ties=BOTH,
        apart=True,
    ),
    Feature("resized vocabulary", resize=True, ties=BOTH),
    Feature(
        "resized, modules_to_save both",
        _set(modules_to_save=[EMBEDDING, HEAD]),
        resize=True,
        ties=BOTH,
        apart=True,
    ),
    Feature("resized, LoRA of embedding and LM head", _also(EMBEDDING, HEAD), resize=True, ties=BOTH, apart=True),
    Feature("resized, LoRA of the tied embedding", _also(EMBEDDING), resize=True, ties=(True,), apart=True),
    Feature("trainable_token_indices", _set(trainable_token_indices=ROWS), ties=BOTH),
    Feature("trainable_token_indices by module", _set(trainable_token_indices={EMBEDDING: ROWS}), ties=BOTH),
    Feature(
        "trainable_token_indices of both",
        _set(trainable_token_indices={EMBEDDING: ROWS, HEAD: [9, 60]}),
        ties=BOTH,
        apart=True,
    ),
    Feature(
        "trainable_token_indices of both, the same",
        _set(trainable_token_indices={EMBEDDING: ROWS, HEAD: ROWS}),
        ties=BOTH,
    ),
    Feature(
        "trainable_token_indices, LoRA of the LM head",
        _also(HEAD, trainable_token_indices=ROWS),
        ties=BOTH,
        apart=True,
    ),
    Feature(
        "trainable_token_indices, modules_to_save LM head",
        _set(trainable_token_indices=ROWS, modules_to_save=[HEAD]),
        families=UNTIABLE,  # PEFT cannot run it on a tied base
    ),
    Feature("resized, trainable_token_indices", _set(trainable_token_indices=[99, 98, 3]), resize=True, ties=BOTH),
    Feature("adapter in a sub-directory", write=_named, families=ONE),
    Feature("Trainer's checkpoint-N", write=_in_checkpoint, families=ONE),
    Feature("raw state_dict", _set(use_dora=True), write=_raw, families=ONE),
    Feature("raw state_dict, modules_to_save", _set(modules_to_save=["norm", HEAD]), write=_raw, families=ONE),
    Feature(
        "raw state_dict, trainable_token_indices",
        _set(trainable_token_indices=ROWS),
        write=_raw,
        ties=BOTH,
        families=ONE,
    ),
    Feature("raw state_dict, LoRA of the embedding", _also(EMBEDDING), write=_raw, families=ONE),
    Feature(
        "raw state_dict under DDP, compile and FSDP",
        _set(modules_to_save=["norm"]),
        write=_raw_with_prefixes,
        families=ONE,
    ),
    Feature("several adapters in a file", write=_several_in_a_file, options={"adapter_name": "sql"}, families=ONE),
    Feature("bfloat16, float16 and float32 mixed", write=_mixed_dtypes, families=ONE),
)


def ties(feature: Feature, family: str) -> tuple[bool, ...]:
    """GPT-2's bases are always tied."""
    return feature.ties if family in UNTIABLE else feature.ties[-1:]


def variants() -> list[tuple[Feature, str, bool]]:
    """Every feature with every tie on llama, and with one in turn on families with modules of their own.

    One in turn of those that have llama's modules joins them. The command of ``peft_table.py`` runs them all.
    """
    found = []
    for i, feature in enumerate(FEATURES):
        for family in feature.families:
            if family in LIKE_LLAMA and i % len(LIKE_LLAMA) != LIKE_LLAMA.index(family):
                continue
            possible = ties(feature, family)
            turn = (i // len(LIKE_LLAMA) + FAMILIES.index(family)) % len(possible)
            found += [(feature, family, tie) for tie in (possible if family == "llama" else possible[turn : turn + 1])]
    return found


def refused(feature: Feature, family: str, *, fuse: bool) -> str | None:
    """A part of the message with which a combination is refused, or None."""
    if feature.apart and family not in UNTIABLE:
        return "one tensor for both"
    return None if fuse or feature.live else "leave out --keep-adapters"


def label(feature: Feature, tie: bool) -> str:
    """The feature's row in the table."""
    return f"{feature.name}, {'tied' if tie else 'untied'}" if len(feature.ties) > 1 else feature.name
