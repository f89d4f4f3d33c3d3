"""Safetensors files written so that the bytes depend on names, dtypes, shapes and values alone.

Tensors are written in blocks of rows as they are made, and a full disk is an error.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from specstream_mlx.formats.fingerprint import sha256_file
from specstream_mlx.formats.safetensors import BITS, NAMES

METADATA = {"format": "mlx"}


@dataclass(frozen=True)
class Entry:
    """The header entry of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @classmethod
    def of(cls, name: str, array: mx.array) -> "Entry":
        """The entry under which ``array`` is written."""
        return cls(name, NAMES[array.dtype], tuple(array.shape))


@dataclass(frozen=True)
class TensorOut:
    """Tensors to be written that are made together: their header entries now, their values when their turn comes.

    Attributes:
        entries: one, the parts of a quantised weight, or the two factors of a LoRA.
        blocks: blocks of rows from the first to the last, each a tuple of arrays in the order of ``entries``.
    """

    entries: tuple[Entry, ...]
    blocks: Callable[[], Iterable[tuple[mx.array, ...]]]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @classmethod
    def of(cls, name: str, array: mx.array) -> "TensorOut":
        """A tensor whose value is at hand."""
        return cls((Entry.of(name, array),), lambda: [(array,)])


def write_tensors(
    path: Path,
    tensors: Iterable[TensorOut],
    metadata: Mapping[str, str] = METADATA,
    done: Callable[[int], None] | None = None,
) -> str:
    """Write ``tensors`` and return the sha256 of the file; ``done`` is told the bytes of each block written."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    places: dict[str, int] = {}
    offset = 0
    entries = (entry for tensor in tensors for entry in tensor.entries)
    for entry in sorted(entries, key=lambda e: (-BITS[e.dtype], e.name)):
        end = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        places[entry.name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        output = _HashedFile(file)
        output.write(0, struct.pack("<Q", len(text)) + text)
        for tensor in sorted(tensors, key=lambda t: places[t.entries[0].name]):
            at_byte = [8 + len(text) + places[entry.name] for entry in tensor.entries]
            ends = [start + entry.num_bytes for start, entry in zip(at_byte, tensor.entries, strict=True)]
            for blocks in tensor.blocks():
                for i, (block, entry) in enumerate(zip(blocks, tensor.entries, strict=True)):
                    data = raw_bytes(block, entry)
                    output.write(at_byte[i], data)
                    at_byte[i] += len(data)
                    if done is not None:
                        done(len(data))
                    del data
            assert at_byte == ends, (tensor.entries, at_byte, ends)
            mx.clear_cache()
        file.flush()
        os.fsync(file.fileno())
    return output.sha256() or sha256_file(path)


class _HashedFile:
    """A file being written at any place, hashed on the way as long as the writes follow one another."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest: hashlib._Hash | None = hashlib.sha256()
        self._end = 0

    def write(self, start: int, data: bytes | memoryview) -> None:
        if start != self._end:
            self._digest = None
        self._file.seek(start)
        self._file.write(data)
        self._end = start + len(data)
        if self._digest is not None:
            self._digest.update(data)

    def sha256(self) -> str | None:
        return self._digest.hexdigest() if self._digest is not None else None


def raw_bytes(array: mx.array, entry: Entry) -> memoryview:
    """The little-endian bytes of rows of a tensor, checked against the header entry they are written under."""
    assert NAMES[array.dtype] == entry.dtype, (entry, array.dtype)
    assert tuple(array.shape)[1:] == entry.shape[1:], (entry, array.shape)
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    flat = mx.contiguous(array.reshape(-1))
    flat = flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(unsigned)
    return np.ascontiguousarray(np.array(flat, copy=False)).data.cast("B")


def save_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] = METADATA) -> None:
    """Write arrays that are at hand; unlike ``mx.save_safetensors`` this fails when the disk is full."""
    write_tensors(path, [TensorOut.of(name, value) for name, value in tensors.items()], metadata)
