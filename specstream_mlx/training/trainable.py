"""Which parameters of a model train: its streams, and LoRA on stream rows (lossless) or on all rows (shared)."""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from specstream_mlx.drafters.streams.lora import StreamLoRALinear
from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.errors import UnsupportedError, UsageError
from specstream_mlx.formats.config import LORA_PREFIX, PREFIX, StreamConfig
from specstream_mlx.models.adapters import Adapter
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.target.mounts import Mount, MountedLayer
from specstream_mlx.training.batches import mixed_seed

TRAINED = "trained"  # the name of the adapter that is being trained
_LORA = ("lora_a", "lora_b")
_STREAM_STD = 0.02  # of a fresh stream embedding


def attach(
    model: SpecStreamModel,
    config: StreamConfig,
    *,
    rank: int,
    scale: float,
    num_layers: int = -1,
    keys: Sequence[str] | None = None,
    seed: int = 0,
) -> None:
    """Give a loaded model fresh streams and LoRA, in place, float32, and freeze the rest.

    They are an adapter of the model, called ``"trained"``; the one in use is put aside. LoRA starts as zero, ``f_eta``
    and the pruner as the identity, so that training starts from the base.

    Args:
        model: as ``load`` returns it.
        config: of the streams.
        rank: of LoRA.
        scale: of LoRA.
        num_layers: shared mode: LoRA in so many blocks from the top; -1 for all. Lossless mode: the stream layers.
        keys: linear layers that get LoRA, by their paths within a block or in the model; None for all.
        seed: of the fresh tensors.

    Raises:
        UnsupportedError: the model carries a live LoRA, which an adapter beside it would drop.
        UsageError: a number or a key does not fit the model.
    """
    bare(model)
    check_fits(model, config, num_layers, keys)
    if TRAINED in model.adapters:
        model.unload_adapter(TRAINED)
    hidden_size = model.family.size(vars(model.args), "hidden_size")
    streams = Streams(config, hidden_size)
    fresh = []
    for name, shape in config.tensor_shapes(hidden_size).items():
        if name == "stream_embeddings":
            value = _STREAM_STD * mx.random.normal(shape, key=_key(seed, name))
        elif ".up." in name and _residual(config, name):
            value = mx.zeros(shape)
        else:
            value = mx.random.uniform(-1, 1, shape, key=_key(seed, name)) / math.sqrt(shape[1])
        fresh.append((name, value))
    streams.update(tree_unflatten(fresh))
    model.freeze()
    layers = []
    modules = dict(model.base.named_modules())
    for name in lora_modules(model, config, num_layers, keys):
        linear = modules[name]
        if config.mode == "lossless":
            lora_a, lora_b = mx.zeros((_columns(linear), rank)), mx.zeros((rank, linear.weight.shape[0]))
            lora: Any = StreamLoRALinear(linear, lora_a, lora_b, scale, model.context)
        else:
            lora = LoRALinear.from_base(linear, r=rank, dropout=0.0, scale=scale)
        bound = 1 / math.sqrt(_columns(linear))
        lora.lora_a = mx.random.uniform(-bound, bound, (_columns(linear), rank), key=_key(seed, name))
        layers.append(MountedLayer(name, linear, lora))
    model.add_adapter(TRAINED, Adapter(config, streams, Mount(tuple(layers))))
    model.use_adapter(TRAINED)
    train_streams_and_lora(model)


def bare(model: SpecStreamModel) -> None:
    """Put aside the streams that a model carries.

    Raises:
        UnsupportedError: it carries a live LoRA too, which is part of what it says.
    """
    names = [name for name, _ in tree_flatten(model.base.parameters())]
    stream_lora = [path for path, m in model.base.named_modules() if isinstance(m, StreamLoRALinear)]
    if any(name.endswith(_LORA) and name.rpartition(".")[0] not in stream_lora for name in names):
        raise UnsupportedError("--model: has a live LoRA in adapters/; fuse it first (mlx_lm fuse), then train on that")
    model.use_adapter(None)


def check_fits(
    model: SpecStreamModel, config: StreamConfig, num_layers: int = -1, keys: Sequence[str] | None = None
) -> None:
    """Make sure that ``attach`` can do with a bare model what it is asked for.

    Raises:
        UsageError: a number or a key does not fit the model.
    """
    total = len(model.layers)
    if config.num_stream_layers > total:
        raise UsageError(f"--num-stream-layers: got {config.num_stream_layers}, the model has {total} layers")
    if not -1 <= num_layers <= total or num_layers == 0:
        raise UsageError(f"--num-layers: got {num_layers}, expected 1..{total}, or -1 for all")
    if config.prune is not None and not 1 <= config.prune.layer < total:
        raise UsageError(
            "--prune-rank: a pruner reads below the stream layers, and --num-stream-layers covers them all"
        )
    for key in keys or ():
        if not lora_modules(model, config, num_layers, [key]):
            known = dict.fromkeys(path for _, path, _ in _linear_layers(model))
            whole = key.startswith(model.family.LAYERS + ".")
            which = "that may get LoRA" if whole else f"of the blocks: {', '.join(known)}"
            raise UsageError(f"lora_parameters.keys: {key!r} is no linear layer {which}")


def train_pruner_only(model: SpecStreamModel) -> None:
    """Freeze everything but the early-exit pruner."""
    assert model.streams is not None
    model.freeze()
    model.streams.prune.unfreeze()
    model.train()


def train_streams_and_lora(model: SpecStreamModel) -> None:
    """Freeze everything but the streams and LoRA."""
    assert model.streams is not None
    model.freeze()
    model.streams.unfreeze()
    for module in model.base.modules():
        if isinstance(module, StreamLoRALinear | LoRALinear):
            module.unfreeze(keys=list(_LORA), recurse=False)
    model.train()


def trained_tensors(model: SpecStreamModel) -> dict[str, mx.array]:
    """What training changes, under the names of ``specstream.safetensors``: ``specstream.*`` and ``lora.<module>.*``.

    LoRA carries its prefix in shared mode too, where a file of mlx-lm's own format leaves it out.
    """
    assert model.streams is not None
    tensors = {PREFIX + name: value for name, value in tree_flatten(model.streams.parameters())}
    for name, value in tree_flatten(model.base.parameters()):
        if name.endswith(_LORA):
            tensors[LORA_PREFIX + name] = value
    return tensors


def set_trained_tensors(model: SpecStreamModel, tensors: dict[str, mx.array]) -> None:
    """The inverse of ``trained_tensors``; names and shapes must be the same.

    Raises:
        UsageError: they are not.
    """
    own = trained_tensors(model)
    problems = [f"{name}: missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name}: the training has no such tensor" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name}: shape {tensors[name].shape}, the training needs {own[name].shape}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise UsageError("\n".join(sorted(problems)))
    assert model.streams is not None
    floats = {name: value.astype(mx.float32) for name, value in tensors.items()}
    model.streams.update(
        tree_unflatten([(name.removeprefix(PREFIX), v) for name, v in floats.items() if name.startswith(PREFIX)])
    )
    model.base.update(
        tree_unflatten(
            [(name.removeprefix(LORA_PREFIX), v) for name, v in floats.items() if name.startswith(LORA_PREFIX)]
        )
    )


def lora_modules(
    model: SpecStreamModel, config: StreamConfig, num_layers: int = -1, keys: Sequence[str] | None = None
) -> dict[str, int]:
    """The linear layers that LoRA goes on: their paths in a bare model, and the index of the block of each.

    As in mlx-lm a key is a path within a block, of those that ``num_layers`` leaves, or one in the model, of any
    block; lossless mode has LoRA in the stream layers alone.
    """
    total = len(model.layers)
    lossless = config.mode == "lossless"
    first = total - (config.num_stream_layers if lossless else total if num_layers == -1 else num_layers)
    found = {}
    for index, path, name in _linear_layers(model):
        by_name = keys is not None and name in keys
        if (by_name and not lossless) or (index >= first and (by_name or keys is None or path in keys)):
            found[name] = index
    return found


def _linear_layers(model: SpecStreamModel) -> Iterator[tuple[int, str, str]]:
    """Block index, path within the block, and path in the model of every linear layer that may get LoRA."""
    for index, layer in enumerate(model.layers):
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | nn.QuantizedLinear):
                yield index, path, f"{model.family.LAYERS}.{index}.{path}"


def _key(seed: int, name: str) -> mx.array:
    """A random key for a tensor, so that its start does not depend on which others there are."""
    return mx.random.key(mixed_seed(seed, zlib.crc32(name.encode())))


def _residual(config: StreamConfig, name: str) -> bool:
    if name.startswith("prune."):
        return config.prune is not None and config.prune.residual
    return config.stream_init.residual


def _columns(linear: nn.Module) -> int:
    """Input size of a linear layer, quantised or not."""
    columns: int = linear.weight.shape[1]
    return columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns
