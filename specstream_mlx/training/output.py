"""What a training writes: the stream adapter that ``generate --adapter`` takes.

Every file is written to a temporary directory beside its target, flushed to the disk, and renamed, so that a full
disk or a lost process leaves what was there before (``specstream_mlx.formats.atomic``).
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from safetensors import SafetensorError

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.formats import atomic
from specstream_mlx.formats.config import (
    BASE_FIELDS,
    CONFIG_NAME,
    LORA_PREFIX,
    WEIGHTS_NAME,
    StreamConfig,
    read_json,
)
from specstream_mlx.formats.fingerprint import fingerprint
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.formats.tensor_writer import save_tensors
from specstream_mlx.models.model import SpecStreamModel

ADAPTERS = "adapters/adapters.safetensors"
CARD = "README.md"


def describe_base(config: Mapping[str, Any], name: str, model: SpecStreamModel) -> dict[str, Any]:
    """The ``base_model`` block of ``specstream_config.json``, with a fingerprint where the family has a tensor for it.

    Args:
        config: the base's ``config.json``.
        name: repository id, or the directory's name.
        model: the loaded base.
    """
    sizes = {key: model.family.size(config, key) for key in BASE_FIELDS}
    base = {"name_or_path": name} | {key: value for key, value in sizes.items() if value is not None}
    tensor = model.family.fingerprint_tensor(config)
    if tensor is None:
        return base
    weight: mx.array = dict(tree_flatten(model.base.parameters()))[tensor]
    return base | {"fingerprint": fingerprint(tensor, weight)}


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """``atomic.replaced_directory`` for users.

    Raises:
        UsageError: it cannot be written; whatever ``target`` held is still there.
    """
    try:
        with atomic.replaced_directory(target) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{target}: cannot be written ({reason}); what was saved before is as it was") from error


def write_adapter(directory: Path, config: StreamConfig, tensors: Mapping[str, mx.array], num_layers: int) -> None:
    """Write the files of a stream adapter into a directory that exists.

    Args:
        directory: where to.
        config: of the streams; its ``lora`` block gives rank and scale.
        tensors: as ``trained_tensors`` names them.
        num_layers: blocks of the base.
    """
    assert config.lora is not None
    lora = {name: value for name, value in tensors.items() if name.startswith(LORA_PREFIX)}
    modules = sorted({name.removeprefix(LORA_PREFIX).rpartition(".")[0] for name in lora})
    placement = "live" if config.mode == "shared" else "sidecar"
    summary = config.lora | {"placement": placement, "num_modules": len(modules)}
    beside = dict(tensors) if config.mode == "lossless" else {k: v for k, v in tensors.items() if k not in lora}
    save_tensors(directory / WEIGHTS_NAME, beside)
    write_json(directory / CONFIG_NAME, config.to_dict() | {"lora": summary})
    if config.mode == "shared":
        (directory / "adapters").mkdir()
        save_tensors(directory / ADAPTERS, {name.removeprefix(LORA_PREFIX): value for name, value in lora.items()})
        parameters = {"rank": config.lora["rank"], "scale": config.lora["scale"], "dropout": 0.0, "keys": modules}
        live = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
        write_json(directory / "adapters" / "adapter_config.json", live)
    (directory / CARD).write_text(_card(config), encoding="utf-8")


def read_adapter(directory: Path) -> tuple[StreamConfig, dict[str, mx.array]]:
    """A stream adapter's configuration and its tensors as ``trained_tensors`` names them.

    Raises:
        InvalidInputError: a file is missing or damaged.
    """
    config = StreamConfig.from_dict(read_json(directory / CONFIG_NAME), str(directory / CONFIG_NAME))
    tensors: dict[str, mx.array] = {}
    files = [(directory / WEIGHTS_NAME, "")]
    if config.mode == "shared":
        files.append((directory / ADAPTERS, LORA_PREFIX))
    for path, prefix in files:
        check_safetensors(path)
        loaded: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
        tensors |= {prefix + name: value for name, value in loaded.items()}
    bad = [name for name, value in tensors.items() if not mx.isfinite(value).all().item()]
    if bad:
        raise InvalidInputError("\n".join(f"{directory}:{name}: holds NaN or infinite values" for name in bad))
    return config, tensors


def write_json(path: Path, value: Any) -> None:
    """Write JSON the same way every time."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _card(config: StreamConfig) -> str:
    base = str(config.base_model.get("name_or_path", "the base model"))
    front = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "- speculative-decoding"]
    if "/" in base:
        front.append(f"base_model: {base}")
    lines = [
        *front,
        "---",
        "",
        f"# Speculative streams for {base}",
        "",
        f"{config.gamma} streams over the top {config.num_stream_layers} layers, mode `{config.mode}`, trained by "
        "specstream-mlx (Speculative Streaming, arXiv 2402.11131).",
    ]
    if config.mode == "lossless":
        lines += ["The answers are those of the base model; the LoRA acts on the draft streams only."]
    else:
        lines += ["The LoRA in `adapters/` changes the answers: it is a fine-tune of the base."]
    lines += ["", "```bash", "pip install specstream-mlx"]
    lines += [f'specstream-mlx generate --model {base} --adapter . --prompt "..."', "```", ""]
    return "\n".join(lines)
