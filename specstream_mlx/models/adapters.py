"""Adapters: what is put over a base, and taken away again, without touching one of its weights.

An adapter is a directory: streams (``specstream_config.json``, ``specstream.safetensors``), a LoRA in mlx-lm's format,
or both. Read, it is an ``Adapter``: the streams, and layers with LoRA around the base's own. Using it puts those
layers in the places of the base's, and leaving it puts the base's back, so any number can lie in memory at once.
Everything is checked before anything is in use: each stream tensor by name and shape, and the base by its mark.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters

from specstream_mlx.drafters.streams.lora import StreamLoRALinear
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.formats.adapter_directory import LIVE_CONFIG, LIVE_WEIGHTS, has_streams, live_lora, read_tensors
from specstream_mlx.formats.base_model import base_problems
from specstream_mlx.formats.config import (
    BASE_SIZES,
    CONFIG_NAME,
    LORA_PREFIX,
    PREFIX,
    WEIGHTS_NAME,
    StreamConfig,
    read_json,
)
from specstream_mlx.formats.load_errors import load_error
from specstream_mlx.formats.safetensors import FLOATS, check_safetensors
from specstream_mlx.planning.times import PassTimes
from specstream_mlx.target.mounts import BARE, Mount, MountedLayer, put_layers
from specstream_mlx.target.rotary import PassContext

OWN = "own"  # the name of the streams that lie in a model's own directory
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_IS_PEFT = "{}: a PEFT checkpoint; run specstream-mlx convert --adapter-only on it"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory, for one base.

    Attributes:
        stream_config, streams: both None for a LoRA without streams.
        mount: what it puts in the places of the base's layers.
        pass_times: what recent passes with it took, by drafter.
    """

    stream_config: StreamConfig | None = None
    streams: Streams | None = None
    mount: Mount = BARE
    pass_times: defaultdict[str, PassTimes] = field(default_factory=lambda: defaultdict(PassTimes))

    @property
    def arrays(self) -> list[mx.array]:
        """Its own tensors, without the base's, which lie in the layers that it wraps."""
        streams = [] if self.streams is None else [value for _, value in tree_flatten(self.streams.parameters())]
        held = (value for layer in self.mount.layers for value in layer.adapted.values())
        return [*streams, *(value for value in held if isinstance(value, mx.array))]

    @property
    def num_bytes(self) -> int:
        """Memory of its own tensors."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def changes_text(self) -> bool:
        """Whether main rows run through its LoRA: it is a fine-tune. Otherwise the text is the base's."""
        return any(not isinstance(layer.adapted, StreamLoRALinear) for layer in self.mount.layers)


def check_adapter_configuration(directory: Path) -> None:
    """Refuse an adapter that we do not run, by its configuration alone.

    Raises:
        InvalidInputError: a PEFT checkpoint, or a damaged configuration.
        UnsupportedError: a format version that we do not run.
    """
    config_file, live_config = directory / CONFIG_NAME, directory / LIVE_CONFIG
    if config_file.exists():
        StreamConfig.from_dict(read_json(config_file), str(config_file))
    elif live_config.exists() and "peft_type" in read_json(live_config):
        raise InvalidInputError(_IS_PEFT.format(directory))


def read_adapter(directory: Path, base: nn.Module, family: DecoderFamily, context: PassContext) -> Adapter:
    """Read an adapter for a bare base, which is as before when this returns or raises.

    Args:
        directory: of the adapter.
        base: without any other adapter.
        family: of the base.
        context: of the model, which tells stream-only LoRA the rows of a pass.

    Raises:
        InvalidInputError: missing, damaged or mismatched files, or streams of another base.
        UnsupportedError: a format version or a kind of adapter that we do not run.
    """
    live = live_lora(directory)
    if not has_streams(directory) or not (directory / WEIGHTS_NAME).exists():
        if any((directory / name).exists() for name in _PEFT_WEIGHTS):
            raise InvalidInputError(_IS_PEFT.format(directory))
        if not has_streams(directory) and live is None:
            raise InvalidInputError(
                f"{directory}: no {CONFIG_NAME} and {WEIGHTS_NAME}, and no LoRA of mlx-lm; give a converted stream "
                "adapter"
            )
    config = streams = None
    layers: tuple[MountedLayer, ...] = ()
    if has_streams(directory):
        config, streams, layers = _read_streams(directory, base, family, context)
        if config.mode == "lossless" and live is not None:
            raise InvalidInputError(f"{live}: a LoRA on all rows, and the streams beside it are lossless; remove one")
    if live is not None:
        layers = _read_live_lora(live, base)
    adapter = Adapter(config, streams, Mount(layers))
    mx.eval(adapter.arrays)
    return adapter


def _read_streams(
    directory: Path, base: nn.Module, family: DecoderFamily, context: PassContext
) -> tuple[StreamConfig, Streams, tuple[MountedLayer, ...]]:
    """Streams, and in lossless mode the LoRA of their rows."""
    config_file, weights_file = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    stream_config = StreamConfig.from_dict(read_json(config_file), str(config_file))
    sizes = vars(base.args)
    _check_base(stream_config, family, base, sizes, config_file)
    hidden_size = family.size(sizes, "hidden_size")
    tensors = _read_tensors(weights_file, stream_config, hidden_size)
    dtype = family.dtype
    lora = {name: tensors.pop(name).astype(dtype) for name in list(tensors) if name.startswith(LORA_PREFIX)}
    streams = Streams(stream_config, hidden_size)
    streams.update(
        tree_unflatten([(name.removeprefix(PREFIX), value.astype(dtype)) for name, value in tensors.items()])
    )
    streams.eval()
    if not lora:
        if stream_config.mode == "lossless" and stream_config.lora:
            raise InvalidInputError(f"{weights_file}: {CONFIG_NAME} names a LoRA and no {LORA_PREFIX}* tensor is there")
        return stream_config, streams, ()
    return stream_config, streams, _stream_lora(base, family, lora, stream_config, context, weights_file)


def _read_tensors(path: Path, config: StreamConfig, hidden_size: int) -> dict[str, mx.array]:
    """The stream tensors, every one checked, problems collected."""
    found = check_safetensors(path)
    expected = {PREFIX + name: shape for name, shape in config.tensor_shapes(hidden_size).items()}
    problems = [f"{path}:{name}: missing" for name in expected if name not in found]
    for name, info in found.items():
        lora = name.startswith(LORA_PREFIX) and config.mode == "lossless"
        if name not in expected and not lora:
            problems.append(f"{path}:{name}: not expected by {CONFIG_NAME}")
        elif info.dtype not in FLOATS:
            problems.append(f"{path}:{name}: dtype {info.dtype}, expected one of {', '.join(FLOATS)}")
        elif not lora and info.shape != expected[name]:
            problems.append(f"{path}:{name}: shape {info.shape}, {CONFIG_NAME} and the base need {expected[name]}")
    if problems:
        raise InvalidInputError("\n".join(problems))
    return read_tensors(path)


def _check_base(
    stream_config: StreamConfig, family: DecoderFamily, base: nn.Module, config: dict[str, Any], where: Path
) -> None:
    """The streams' base block against the base at hand: sizes, and the fingerprint when both sides have one."""
    marked = family.fingerprint_tensor(config)
    sizes = {key: family.size(config, key) for key in BASE_SIZES}
    problems = base_problems(
        stream_config,
        where,
        sizes,
        len(family.layers),
        lambda name: dict(tree_flatten(base.parameters()))[name] if name == marked else None,
    )
    if problems:
        raise InvalidInputError("\n".join(problems))


def _stream_lora(
    base: nn.Module,
    family: DecoderFamily,
    lora: dict[str, mx.array],
    stream_config: StreamConfig,
    context: PassContext,
    where: Path,
) -> tuple[MountedLayer, ...]:
    """The linear layers that a lossless checkpoint has LoRA for, main rows running the base's alone."""
    scale = (stream_config.lora or {}).get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise InvalidInputError(f"{where.parent / CONFIG_NAME}: lora.scale is {scale!r}, expected a number")
    modules = dict(base.named_modules())
    num_trunk_layers = len(family.layers) - stream_config.num_stream_layers
    problems, layers = [], []
    paths = sorted({name.removeprefix(LORA_PREFIX).rsplit(".", 1)[0] for name in lora})
    for path in paths:
        a, b = lora.pop(f"{LORA_PREFIX}{path}.lora_a", None), lora.pop(f"{LORA_PREFIX}{path}.lora_b", None)
        linear = modules.get(path)
        match = re.match(rf"{re.escape(family.LAYERS)}\.(\d+)\.", path)
        if a is None or b is None:
            problems.append(f"{where}:{LORA_PREFIX}{path}: needs both lora_a and lora_b")
        elif match is None or int(match[1]) < num_trunk_layers:
            problems.append(f"{where}:{LORA_PREFIX}{path}: lies below the stream layers, it would never act")
        elif not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            has = "no layer of this name" if linear is None else f"a {type(linear).__name__} here"
            problems.append(
                f"{where}:{LORA_PREFIX}{path}: LoRA on stream rows needs a linear layer, the base has {has}"
            )
        elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != _dims(linear):
            problems.append(f"{where}:{LORA_PREFIX}{path}: shapes {a.shape} and {b.shape} do not fit {_dims(linear)}")
        else:
            adapted = StreamLoRALinear(linear, a, b, float(scale), context).eval()
            layers.append(MountedLayer(path, linear, adapted))
    problems += [f"{where}:{name}: unknown LoRA tensor" for name in lora]
    if problems:
        raise InvalidInputError("\n".join(problems))
    return tuple(layers)


def _read_live_lora(directory: Path, base: nn.Module) -> tuple[MountedLayer, ...]:
    """The layers that mlx-lm's own loader makes of a LoRA in its format; the base gets its own back."""
    config_file, weights_file = directory / LIVE_CONFIG, directory / LIVE_WEIGHTS
    kind = read_json(config_file).get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(
            f"{config_file}: fine_tune_type is {kind!r}; only 'lora' and 'dora' leave the base as it is, load a full "
            "fine-tune as a model"
        )
    held = read_tensors(weights_file)
    if not held:
        raise InvalidInputError(f"{weights_file}: holds no tensor, so it would change nothing; save the adapter again")
    before = dict(base.named_modules())

    def replaced() -> list[MountedLayer]:
        after = base.named_modules()
        return [MountedLayer(path, before[path], new) for path, new in after if before.get(path, new) is not new]

    try:
        load_adapters(base, str(directory))
        layers = replaced()
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, RuntimeError) as error:
        raise load_error(directory, error, "LoRA") from error
    finally:
        put_layers(base, [(layer.path, layer.bare) for layer in replaced()])
    used = {name.rpartition(".")[0] for name in held}
    layers = [layer for layer in layers if layer.path in used]
    missing = [
        f"{weights_file}:{layer.path}.{part}: missing"
        for layer in layers
        for part in ("lora_a", "lora_b", "m")
        if part in layer.adapted and f"{layer.path}.{part}" not in held
    ]
    if missing:
        raise InvalidInputError("\n".join(missing))
    for layer in layers:
        layer.adapted.eval()
    return tuple(layers)


def _dims(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantised or not."""
    out, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = columns * 32 // linear.bits
    return columns, out
