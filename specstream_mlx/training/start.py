"""``--resume-adapter-file``: the adapter that a training starts from, and the settings that come with it.

Its tensors decide which modules have LoRA, of which rank and scale; a flag that says otherwise is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.tuner.lora import LoRALinear

from specstream_mlx.drafters.streams.lora import StreamLoRALinear
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError
from specstream_mlx.formats.adapter_directory import ADAPTERS, read_adapter
from specstream_mlx.formats.config import CONFIG_NAME, WEIGHTS_NAME, StreamConfig, read_json
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.mounts import MountedLayer
from specstream_mlx.training.settings import TrainSettings, flag
from specstream_mlx.training.trainable import lora_modules

_NAME = "resume_adapter_file"  # what the adapter is called while it is looked at


def settings_of(adapter: Path) -> dict[str, Any]:
    """The settings that a stream adapter's tensors depend on, as its configuration has them.

    Raises:
        InvalidInputError: it is another kind of directory, or damaged.
    """
    where = f"--resume-adapter-file: {adapter}"
    if (adapter / "adapter_model.safetensors").exists() and not (adapter / WEIGHTS_NAME).exists():
        raise InvalidInputError(f"{where}: a checkpoint in PEFT's form; bring it here with `convert --adapter-only`")
    if not (adapter / CONFIG_NAME).exists():
        raise InvalidInputError(f"{where}: no stream adapter, it has no {CONFIG_NAME}; give one that train wrote")
    try:
        config = StreamConfig.from_dict(read_json(adapter / CONFIG_NAME), str(adapter / CONFIG_NAME))
        if config.mode == "shared" and not (adapter / ADAPTERS).exists():
            raise InvalidInputError(
                f"{adapter}: shared mode without {ADAPTERS}: its LoRA is merged into a model, or lost; convert the "
                "fine-tune with --adapter-only and give that"
            )
        read_adapter(adapter)
    except SpecStreamError as error:
        raise _in_one_line(error) from error
    lora: Mapping[str, Any] = config.lora or {}
    found = {
        "mode": config.mode,
        "gamma": config.gamma,
        "num_stream_layers": config.num_stream_layers,
        "value_rotation": config.stream_id.epsilon,
        "stream_init_rank": config.stream_init.rank,
        "stream_position": config.stream_position,
        "prune_rank": config.prune.rank if config.prune is not None else None,
    }
    return found | {key: lora[key] for key in ("rank", "scale") if isinstance(lora.get(key), int | float)}


def check_agreement(adapter: Path, theirs: Mapping[str, Any], chosen: TrainSettings) -> None:
    """Make sure that no flag contradicts the adapter; a pruner may come new.

    Raises:
        UsageError: one does.
    """
    changed = [
        f"{flag(name)} {getattr(chosen, name)} differs from its {value}"
        for name, value in theirs.items()
        if getattr(chosen, name) != value and (name, value) != ("prune_rank", None)
    ]
    if changed:
        raise UsageError(f"--resume-adapter-file: {adapter}: {', '.join(changed)}; drop the options")


def settings_with_its_lora(
    model: SpecStreamModel, adapter: Path, chosen: TrainSettings, given: Mapping[str, Any]
) -> TrainSettings:
    """The settings with LoRA as the adapter has it: where, of which rank and scale.

    An adapter of streams alone, in lossless mode, leaves that to the settings.

    Args:
        model: bare, with no adapter in use.
        adapter: its directory.
        chosen: the settings so far.
        given: those of them that the user gave.

    Raises:
        InvalidInputError: the adapter does not fit the model.
        UnsupportedError: it is none that a training here makes.
        UsageError: a setting that was given contradicts it.
    """
    where = f"--resume-adapter-file: {adapter}"
    try:
        name = model.load_adapter(adapter, _NAME)
    except SpecStreamError as error:
        raise _in_one_line(error) from error
    config, layers = model.adapters[name].stream_config, model.adapters[name].mount.layers
    model.unload_adapter(name)
    assert config is not None
    ours = chosen.stream_config(len(model.layers), config.base_model)
    if config.stream_init != ours.stream_init or config.prune not in (None, ours.prune):
        raise UnsupportedError(
            f"{where}: stream_init or prune is not as train makes it (residual, with the final norm, the pruner right "
            "below the stream layers); train new streams"
        )
    if not layers:
        return chosen
    possible = lora_modules(model, ours)
    strange = [layer.path for layer in layers if layer.path not in possible or not _is_lora(layer)]
    if strange:
        raise UnsupportedError(
            f"{where}: has other than plain LoRA on linear layers of the blocks ({_some(strange)}), and train makes "
            "no other; train new streams"
        )
    kinds = {_rank_and_scale(layer, config) for layer in layers}
    if len(kinds) > 1:
        several = ", ".join(f"rank {rank} with scale {scale}" for rank, scale in sorted(kinds))
        raise UnsupportedError(f"{where}: its LoRA is of several kinds ({several}), train's of one; train new streams")
    rank, scale = kinds.pop()
    own = {"rank": rank, "scale": scale}
    check_agreement(adapter, {key: value for key, value in own.items() if key in given}, chosen)
    modules = {layer.path: possible[layer.path] for layer in layers}
    keys, num_layers = _where(model, ours, modules, adapter, given)
    return replace(chosen, rank=rank, scale=scale, lora_keys=keys, num_layers=num_layers)


def _where(
    model: SpecStreamModel, config: StreamConfig, modules: Mapping[str, int], adapter: Path, given: Mapping[str, Any]
) -> tuple[list[str] | None, int]:
    """``lora_keys`` and ``num_layers`` that mean exactly these modules, in the shortest form.

    Args:
        model: bare.
        config: of the streams.
        modules: paths of an adapter's modules, and the index of the block of each.
        adapter: its directory.
        given: the settings that the user gave.

    Raises:
        UsageError: what was given means other modules.
    """
    within = sorted({_within(path, index) for path, index in modules.items()})
    top = len(model.layers) - min(modules.values()) if config.mode == "shared" else -1
    flags = [flag(name) for name in ("lora_keys", "num_layers") if name in given]
    asked = lora_modules(model, config, given.get("num_layers", top), given.get("lora_keys", within))
    if flags and asked.keys() != modules.keys():
        raise UsageError(
            f"--resume-adapter-file: {adapter}: has LoRA on {_described(modules)}, and {' and '.join(flags)} would "
            f"have it on {_described(asked)}; drop the options"
        )
    spellings: list[tuple[list[str] | None, int]] = [(None, -1), (None, top), (within, -1), (within, top)]
    for keys, num_layers in spellings:
        if lora_modules(model, config, num_layers, keys).keys() == modules.keys():
            return keys, num_layers
    return sorted(modules), -1


def _in_one_line(error: SpecStreamError) -> SpecStreamError:
    """An error of many lines as one: the first, and how many there are besides."""
    first, *others = str(error).splitlines()
    more = f" (and {len(others)} more)" if others else ""
    return type(error)(f"--resume-adapter-file: {first}{more}")


def _is_lora(layer: MountedLayer) -> bool:
    return type(layer.adapted) in (LoRALinear, StreamLoRALinear)


def _rank_and_scale(layer: MountedLayer, config: StreamConfig) -> tuple[int, float]:
    scale = layer.adapted.scale if isinstance(layer.adapted, LoRALinear) else (config.lora or {})["scale"]
    return layer.adapted.lora_a.shape[1], float(scale)


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first


def _within(path: str, index: int) -> str:
    """A module's path within its block."""
    return path.split(f".{index}.", 1)[1]


def _described(modules: Mapping[str, int]) -> str:
    """Modules in few words: by name where all layers have the same, else how many and one of them."""
    layers = sorted(set(modules.values()))
    within = sorted({_within(path, index) for path, index in modules.items()})
    of = f"layers {', '.join(map(str, layers))}"
    if len(modules) == len(layers) * len(within):
        return f"{', '.join(within)} of {of}"
    return f"{_some(modules)} of {of}"
