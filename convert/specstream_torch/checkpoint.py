"""PEFT set-up, and checkpoints of form A and form B.

Form A keeps the stream tensors in PEFT's own ``adapter_model.safetensors``, as ``base_model.model.specstream.*``;
form B keeps them in a sibling ``specstream.safetensors``, as ``specstream.*``. Both carry
``specstream_config.json``, because PEFT drops unknown keys of ``adapter_config.json``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from specstream_mlx.formats.atomic import replaced_directory

from .decoder import decoder_of
from .modeling import attach_streams, causal_lm, stream_module
from .streams import SpecStream, StreamConfig

CONFIG_FILE = "specstream_config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
STREAMS_FILE = "specstream.safetensors"
FORMS = ("A", "B")
DROPOUTS = ("dropout", "attention_dropout", "layerdrop", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def load_base(directory: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """Load a Hugging Face causal LM in the dtype and attention that the stream forward expects.

    Dropout of the base (OPT and GPT-2 have it) is left off, so that the main stream is the base's own in training
    too; LoRA brings its own.
    """
    config = AutoConfig.from_pretrained(str(directory))
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_pretrained(
        str(directory), config=config, dtype=dtype, attn_implementation=attention
    )


def linear_modules(model: nn.Module) -> list[str]:
    """Return the leaf names of the linear layers of a decoder block (``qkv_proj`` for phi3, ``c_attn`` for gpt2)."""
    block = decoder_of(causal_lm(model)).layers[0]
    linear = (name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return sorted({name.rpartition(".")[2] for name in linear})


def add_lora(
    model: nn.Module,
    config: StreamConfig,
    *,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    use_rslora: bool = False,
) -> PeftModel:
    """Attach streams and LoRA to a base model and freeze the rest.

    ``alpha`` defaults to twice the rank, ``target_modules`` to every linear layer of a block. Lossless mode
    restricts LoRA to the top ``N_s`` layers.
    """
    targets = list(target_modules) if target_modules is not None else linear_modules(model)
    attach_streams(model, config)
    decoder = decoder_of(causal_lm(model))
    num_layers = len(decoder.layers)
    layers = None
    if config.mode == "lossless":
        layers = list(range(num_layers - config.num_stream_layers, num_layers))
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        lora_dropout=dropout,
        target_modules=targets,
        layers_to_transform=layers,
        layers_pattern=decoder.layers_name if layers is not None else None,
        modules_to_save=["specstream"],
        task_type="CAUSAL_LM",
        use_rslora=use_rslora,
        fan_in_fan_out=decoder.conv1d,
    )
    with _upstream_deprecation_ignored():
        return get_peft_model(model, lora)


def save_checkpoint(
    model: PeftModel,
    directory: str | Path,
    *,
    form: str = "A",
    training: dict[str, Any] | None = None,
    base_name: str | None = None,
) -> Path:
    """Write a checkpoint directory, replacing one that is there; nothing half-written is ever visible.

    ``base_name`` is the name to record for the base model instead of the path it was loaded from.
    """
    with replaced_directory(Path(directory)) as temporary:
        write_checkpoint(model, temporary, form=form, training=training, base_name=base_name)
    return Path(directory)


def write_checkpoint(
    model: PeftModel,
    directory: Path,
    *,
    form: str = "A",
    training: dict[str, Any] | None = None,
    base_name: str | None = None,
) -> None:
    """Write the files of `save_checkpoint` into a directory that exists."""
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's model card template
    base = causal_lm(model)
    mark = decoder_of(base).fingerprint
    config = stream_module(model).config.to_json(base.config, fingerprint=mark, training=training)
    adapter_config = _read_json(directory / ADAPTER_CONFIG_FILE)
    if base_name is not None:
        config["base_model"]["name_or_path"] = base_name
        adapter_config["base_model_name_or_path"] = base_name
    tensors = load_file(directory / ADAPTER_FILE)
    lora = {key: tensor for key, tensor in tensors.items() if not _is_stream_key(key)}
    if form == "B":
        save_file(lora, directory / ADAPTER_FILE, metadata={"format": "pt"})
        streams = stream_module(model).state_dict()
        save_file(
            {f"specstream.{key}": tensor.detach().cpu().contiguous() for key, tensor in streams.items()},
            directory / STREAMS_FILE,
            metadata={"format": "pt"},
        )
        adapter_config["modules_to_save"] = None
    elif len(tensors) == len(lora):
        assert not stream_module(model).state_dict(), "PEFT did not save the stream tensors"
    _write_json(directory / ADAPTER_CONFIG_FILE, adapter_config)
    _write_json(directory / CONFIG_FILE, config)


def load_checkpoint(base: Any, directory: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a checkpoint of either form on a base model (a directory or a loaded model)."""
    directory = Path(directory)
    if isinstance(base, str | Path):
        base = load_base(base)
    attach_streams(base, read_stream_config(directory))
    if (directory / STREAMS_FILE).exists():
        streams = load_file(directory / STREAMS_FILE)
        base.specstream.load_state_dict({key.removeprefix("specstream."): value for key, value in streams.items()})
    else:
        _check_streams_saved(base.specstream, directory / ADAPTER_FILE)
    with _upstream_deprecation_ignored():
        model = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable)
    stream_module(model).requires_grad_(trainable)
    return model


def read_stream_config(directory: str | Path) -> StreamConfig:
    """Read ``specstream_config.json`` of a checkpoint directory."""
    return StreamConfig.from_json(_read_json(Path(directory) / CONFIG_FILE))


@contextmanager
def _upstream_deprecation_ignored() -> Iterator[None]:
    """Silence PEFT's reading of an attribute that transformers 5 renamed; nobody here can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _is_stream_key(key: str) -> bool:
    return ".specstream." in f".{key}"


def _check_streams_saved(module: SpecStream, path: Path) -> None:
    """Refuse a checkpoint without its stream tensors, which PEFT meets with a bare KeyError or with silence."""
    with safe_open(path, framework="pt") as file:
        saved = sum(_is_stream_key(key) for key in file.keys())  # noqa: SIM118 - not a dict
    if saved != len(module.state_dict()):
        raise ValueError(f"{path} has {saved} specstream tensors, expected {len(module.state_dict())}")


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
