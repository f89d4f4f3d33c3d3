"""What ``--quantize`` makes of every tensor: mlx-lm's own decisions, taken on a model that is never computed.

``mlx_lm.utils.quantize_model`` runs on mlx-lm's model with lazy arrays of the right shapes and dtypes. It says which
layers are quantised and how, and what ``config.json`` records. The values are quantised later, block of rows by block
of rows; groups lie within a row, so the bits are those of the whole.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import MAX_FILE_SIZE_GB, quantize_model

from specstream_convert.base.model import lazy_model
from specstream_convert.writing.outputs import OutputTensor
from specstream_mlx.errors import UsageError
from specstream_mlx.formats.safetensors import mlx_dtype
from specstream_mlx.formats.tensor_writer import Entry, TensorOut

PARTS = ("weight", "scales", "biases")  # of a quantised layer
MAX_FILE_BYTES = MAX_FILE_SIZE_GB << 30


@dataclass(frozen=True)
class Quantized:
    """The quantisation of one model.

    Attributes:
        config: ``config.json`` with ``quantization`` and ``quantization_config``.
        layers: quantised weight -> ``group_size``, ``bits`` and ``mode``.
        entries: tensor of the unquantised model -> what is written for it.
    """

    config: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    entries: dict[str, tuple[Entry, ...]]

    def tensor_out(self, output: OutputTensor) -> TensorOut:
        """What is written for ``output``."""
        how = self.layers.get(output.name)
        if how is None:
            return TensorOut(self.entries[output.name], lambda: ((value,) for value in output.blocks()))
        return TensorOut(self.entries[output.name], lambda: _quantize(output.blocks(), how))


def _quantize(blocks: Iterable[mx.array], how: Mapping[str, Any]) -> Iterator[tuple[mx.array, ...]]:
    for block in blocks:
        parts = tuple(mx.quantize(block, **how))
        mx.eval(parts)
        yield parts


def plan_quantization(
    config: Mapping[str, Any], outputs: Iterable[OutputTensor], settings: Mapping[str, Any]
) -> tuple[Quantized, tuple[OutputTensor, ...]]:
    """The quantisation of the model that ``config`` describes, and ``outputs`` in the files that mlx-lm would write.

    Raises:
        UsageError: MLX cannot quantise so, or no layer's size is a multiple of the group size.
    """
    held = {output.name: output for output in outputs}
    model = lazy_model(config)
    model.load_weights([(name, mx.zeros(out.shape, mlx_dtype(out.dtype))) for name, out in held.items()])
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints a line on stdout
            model, new = quantize_model(model, dict(config), **settings)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--quantize: {reason}; choose another --q-bits, --q-group-size or --q-mode") from error
    layers = {
        f"{path}.weight": {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
        if "scales" in module
    }
    if not layers:
        raise UsageError(
            f"--quantize: no layer's size is a multiple of --q-group-size {settings['group_size']}; "
            "choose a smaller one"
        )
    values = {name: Entry.of(name, value) for name, value in tree_flatten(model.parameters())}
    entries = {}
    for name in (name for name in values if name in held):
        module = name.removesuffix(".weight")
        parts = [f"{module}.{part}" for part in PARTS] if name in layers else [name]
        entries[name] = tuple(values[part] for part in parts if part in values)
    assert sum(map(len, entries.values())) == len(values), "a parameter of the quantised model has no source"
    quantized = Quantized(new, layers, entries)
    files = _files({name: sum(entry.num_bytes for entry in parts) for name, parts in entries.items()})
    return quantized, tuple(replace(output, file=files[output.name]) for output in held.values())


def _files(sizes: Mapping[str, int]) -> dict[str, str]:
    """The file of every tensor: as many as ``MAX_FILE_BYTES`` asks for, in the order of the model."""
    shards: list[list[str]] = []
    shard_bytes = 0
    for name, num_bytes in sizes.items():
        if not shards or shard_bytes + num_bytes > MAX_FILE_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
    count = f"of-{len(shards):05d}.safetensors"
    files = [f"model-{i + 1:05d}-{count}" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    return {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
