"""The directory of an adapter: written by train and convert, read by load, train and inspect.

    specstream_config.json                  of the streams
    specstream.safetensors                  stream tensors; in lossless mode the LoRA of their rows beside them, lora.*
    adapters/adapter_config.json            in shared mode: a LoRA on all rows in mlx-lm's format, unless it is merged
    adapters/adapters.safetensors

A directory that mlx-lm wrote holds the last two itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.card import adapter_card
from specstream_mlx.formats.config import CONFIG_NAME, LORA_PREFIX, WEIGHTS_NAME, StreamConfig, read_json
from specstream_mlx.formats.output import write_json
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.formats.tensor_writer import TensorOut, write_tensors

LIVE = "adapters"  # directory of a LoRA in mlx-lm's format
LIVE_CONFIG = "adapter_config.json"
LIVE_WEIGHTS = "adapters.safetensors"
ADAPTERS = f"{LIVE}/{LIVE_WEIGHTS}"
CARD = "README.md"


@dataclass(frozen=True)
class LiveLora:
    """What mlx-lm must know of a LoRA: one rank and one scale for all modules."""

    rank: int
    scale: float
    modules: Sequence[str]
    num_layers: int  # blocks of the base
    dora: bool = False


def write_live(directory: Path, lora: LiveLora, tensors: Iterable[TensorOut]) -> None:
    """Write a LoRA in mlx-lm's format below an adapter's directory; tensors are named ``MODULE.lora_a`` and so on."""
    (directory / LIVE).mkdir()
    write_tensors(directory / ADAPTERS, tensors)
    parameters = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0, "keys": list(lora.modules)}
    kind = "dora" if lora.dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": lora.num_layers, "lora_parameters": parameters}
    write_json(directory / LIVE / LIVE_CONFIG, config)


def write_streams(directory: Path, config: StreamConfig, tensors: Iterable[TensorOut]) -> None:
    """Write streams and their configuration; tensors have the prefixes of the contract."""
    write_tensors(directory / WEIGHTS_NAME, tensors)
    write_json(directory / CONFIG_NAME, config.to_dict())


def write_adapter(directory: Path, config: StreamConfig, tensors: Mapping[str, mx.array], num_layers: int) -> None:
    """Write all files of a trained adapter into a directory that exists.

    Args:
        directory: where to.
        config: of the streams; its ``lora`` block gives rank and scale.
        tensors: as ``trained_tensors`` names them.
        num_layers: blocks of the base.
    """
    assert config.lora is not None
    modules = sorted({_module(name) for name in tensors if name.startswith(LORA_PREFIX)})
    live = config.mode == "shared"
    summary = config.lora | {"placement": "live" if live else "sidecar", "num_modules": len(modules)}
    beside = [TensorOut.of(k, value) for k, value in tensors.items() if not (live and k.startswith(LORA_PREFIX))]
    write_streams(directory, replace(config, lora=summary), beside)
    if live:
        lora = LiveLora(config.lora["rank"], config.lora["scale"], modules, num_layers)
        own = {k.removeprefix(LORA_PREFIX): value for k, value in tensors.items() if k.startswith(LORA_PREFIX)}
        write_live(directory, lora, [TensorOut.of(name, value) for name, value in own.items()])
    (directory / CARD).write_text(adapter_card(config), encoding="utf-8")


def read_adapter(directory: Path) -> tuple[StreamConfig, dict[str, mx.array]]:
    """A stream adapter's configuration and its tensors as ``trained_tensors`` names them.

    Raises:
        InvalidInputError: a file is missing or damaged.
    """
    config = read_stream_config(directory)
    tensors = read_tensors(directory / WEIGHTS_NAME)
    if config.mode == "shared":
        tensors |= {LORA_PREFIX + name: value for name, value in read_tensors(directory / ADAPTERS).items()}
    return config, tensors


def read_stream_config(directory: Path) -> StreamConfig:
    """The configuration of the streams in a directory."""
    path = directory / CONFIG_NAME
    return StreamConfig.from_dict(read_json(path), str(path))


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a file of floats.

    Raises:
        InvalidInputError: it is missing or damaged, or holds values that are not finite; all are listed.
    """
    check_safetensors(path)
    tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    bad = [name for name, value in tensors.items() if not mx.isfinite(value).all().item()]
    if bad:
        raise InvalidInputError("\n".join(f"{path}:{name}: holds NaN or infinite values" for name in bad))
    return tensors


def has_streams(directory: Path) -> bool:
    """Whether there are streams, or a part of them."""
    return (directory / CONFIG_NAME).exists() or (directory / WEIGHTS_NAME).exists()


def has_adapter(directory: Path) -> bool:
    """Whether there is anything in a directory that can be put over a base."""
    return has_streams(directory) or live_lora(directory) is not None


def live_lora(directory: Path) -> Path | None:
    """The directory of an adapter's LoRA in mlx-lm's format, for ``mlx_lm.load(adapter_path=...)``; None without one.

    It is ``adapters`` in a directory of ours. A directory that mlx-lm wrote is one itself, unless it holds a model.
    """
    if (directory / LIVE).is_dir():
        return directory / LIVE
    own = (directory / LIVE_WEIGHTS).exists() and not (directory / "config.json").exists()
    return directory if own else None


def _module(name: str) -> str:
    return name.removeprefix(LORA_PREFIX).rpartition(".")[0]
