"""Safetensors files read, every header checked.

``mx.load`` accepts negative shapes, overlapping offsets and reads fp8 as ``uint8``; so every header is checked here,
by this module and by the reference implementation, before a byte of tensor data is used. Tensors can be read in blocks
of rows, so that the memory of a conversion does not depend on their size.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.fingerprint import sha256_file
from specstream_mlx.formats.messages import at, escaped, listing

MAX_HEADER = 100_000_000
FLOATS = ("F32", "BF16", "F16")
BLOCK = 1 << 20  # values that are in memory together
_MLX = {
    "F32": mx.float32,
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "U16": mx.uint16,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "U64": mx.uint64,
    "BOOL": mx.bool_,
}
NAMES = {dtype: name for name, dtype in _MLX.items()}
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class TensorInfo:
    """One header entry; ``start`` is the byte of the file where the data begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class TensorFile:
    """A validated safetensors file; nothing but its header has been read.

    ``data`` is where the bytes are when ``path``, which messages and reports name, is a pickle they were taken from.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    num_bytes: int
    data: Path | None = None

    @property
    def data_path(self) -> Path:
        """The safetensors file itself."""
        return self.data or self.path

    def read(self, name: str) -> mx.array:
        """The tensor ``name`` in its stored dtype."""
        info = self.tensors[name]
        return self._read(info, info.start, info.num_bytes).reshape(info.shape)

    def read_float32(self, name: str) -> mx.array:
        """The tensor ``name`` in float32, refused unless it is a finite F32, BF16 or F16 tensor."""
        return self.read_finite(name).astype(mx.float32)

    def read_finite(self, name: str) -> mx.array:
        """The float tensor ``name`` in its stored dtype, refused unless every value is finite."""
        blocks = [value for _, value in self.blocks(name, finite=True)]
        return (mx.concatenate(blocks) if len(blocks) > 1 else blocks[0]).reshape(self.tensors[name].shape)

    def blocks(self, name: str, *, finite: bool = False) -> Iterator[tuple[slice, mx.array]]:
        """Slices of rows of the tensor ``name`` and their values in its stored dtype.

        ``finite`` asks for a float tensor whose every value is finite.
        """
        if finite:
            self.require_float(name)
        info = self.tensors[name]
        for rows in row_blocks(info.shape):
            row_bytes = info.num_bytes // info.shape[0] if info.shape else info.num_bytes
            num_bytes = (rows.stop - rows.start) * row_bytes
            value = self._read(info, info.start + rows.start * row_bytes, num_bytes)
            if finite and not bool(mx.isfinite(value).all().item()):
                self._refuse_values(info)
            yield rows, value.reshape((rows.stop - rows.start, *info.shape[1:]) if info.shape else ())

    def _refuse_values(self, info: TensorInfo) -> None:
        num_bad = sum(int((~mx.isfinite(value)).sum()) for _, value in self.blocks(info.name))
        raise InvalidInputError(
            f"{at(self.path, info.name)}: {num_bad} of {math.prod(info.shape)} values are NaN or infinite; "
            "the training diverged or the file is damaged, take an earlier checkpoint"
        )

    def _read(self, info: TensorInfo, start: int, num_bytes: int) -> mx.array:
        """Bytes of a tensor as a flat array of its dtype."""
        if info.dtype not in _MLX:
            raise UnsupportedError(
                f"{at(self.path, info.name)}: dtype {info.dtype} is not supported; save it as BF16 or F32"
            )
        dtype = _MLX[info.dtype]
        try:
            with self.data_path.open("rb") as file:
                file.seek(start)
                raw = file.read(num_bytes)
        except OSError as error:
            raise InvalidInputError(f"{self.path}: cannot be read ({error.strerror})") from error
        if len(raw) != num_bytes:
            raise InvalidInputError(
                f"{at(self.path, info.name)}: the file became shorter while it was read; "
                "try again when nothing writes it"
            )
        return mx.array(np.frombuffer(raw, dtype=_RAW[dtype.size])).view(dtype)

    def require_float(self, name: str) -> None:
        """Refuse a tensor whose dtype has no exact float32 value here."""
        dtype = self.tensors[name].dtype
        if dtype in FLOATS:
            return
        place = at(self.path, name)
        if dtype.startswith("F"):
            raise UnsupportedError(f"{place}: dtype {dtype} is not supported; save it as BF16 or F32")
        raise InvalidInputError(f"{place}: dtype is {dtype}, expected a float tensor; save it as F32, BF16 or F16")

    def sha256(self) -> str:
        """The digest of the whole file."""
        return sha256_file(self.path)


def row_blocks(shape: tuple[int, ...], values: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a tensor, each of ``values`` (:data:`BLOCK`) or one row; at least one slice."""
    num_rows = shape[0] if shape else 1
    step = max(1, (values or BLOCK) // max(1, math.prod(shape[1:])))
    for start in range(0, max(1, num_rows), step):
        yield slice(start, min(start + step, num_rows))


def open_tensors(path: Path) -> TensorFile:
    """Validate a safetensors file and return its header.

    Raises:
        InvalidInputError: missing, empty, truncated, a Git LFS pointer, or a header that contradicts the file.
    """
    if not path.exists():
        raise InvalidInputError(f"{path}: file not found; give a path that exists")
    if not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file; give the file itself")
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = _header_bytes(path, start, num_bytes, file.read)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    header = _parse_header(path, header_bytes)
    tensors = _check_header(path, header, 8 + len(header_bytes), num_bytes)
    try:
        with safe_open(path, framework="numpy") as checked:
            if set(checked.keys()) != set(tensors):
                raise InvalidInputError(
                    f"{path}: the safetensors library reads other tensor names; the file is damaged, save it again"
                )
    except (SafetensorError, OSError, ValueError) as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(
            f"{path}: not a valid safetensors file ({reason}); download or save it again"
        ) from error
    return TensorFile(path, tensors, num_bytes)


def check_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name; see ``open_tensors``."""
    return open_tensors(path).tensors


def _header_bytes(path: Path, start: bytes, num_bytes: int, read: Callable[[int], bytes]) -> bytes:
    if num_bytes == 0:
        raise InvalidInputError(f"{path}: the file is empty; download or save it again")
    if start.startswith(b"version "):
        raise InvalidInputError(f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull`")
    if num_bytes < 8:
        raise InvalidInputError(f"{path}: {num_bytes} bytes are too few for a safetensors file; download it again")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise InvalidInputError(
            f"{path}: the header claims {length} bytes, the limit is {MAX_HEADER}; download it again"
        )
    if length + 8 > num_bytes:
        raise InvalidInputError(
            f"{path}: the header needs {length + 8} bytes, the file has {num_bytes}; it is incomplete, "
            "download or save it again"
        )
    return read(length)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            names = [key for key, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})[:5] if len(names) < 10_000 else []
            raise InvalidInputError(
                f"{path}: names appear twice in the header: {', '.join(map(escaped, twice))}; save it again"
            )
        return seen

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(
            f"{path}: the safetensors header is not valid JSON ({reason}); download or save it again"
        ) from error
    if not isinstance(header, dict):
        raise InvalidInputError(f"{path}: the safetensors header is not an object; download or save it again")
    return header


def _check_header(path: Path, header: dict[str, Any], data: int, num_bytes: int) -> dict[str, TensorInfo]:
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"{at(path, name)}: {problem}; save it again")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)
    end = data
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.num_bytes)):
        if info.start != end:
            problems.append(
                f"{at(path, info.name)}: its data begins at byte {info.start}, expected {end}; save it again"
            )
        end = max(end, info.start + info.num_bytes)
    if problems:
        raise InvalidInputError(listing(problems))
    if end > num_bytes:
        raise InvalidInputError(
            f"{path}: expected {end} bytes, the file has {num_bytes}; the file is incomplete, download or save it again"
        )
    if end < num_bytes:
        raise InvalidInputError(f"{path}: expected {end} bytes, the file has {num_bytes}; it is damaged, save it again")
    return tensors


def _entry_problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "the header entry needs exactly dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"unknown dtype {escaped(str(dtype))}"
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        return f"bad shape {escaped(str(shape))}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        return f"bad data_offsets {escaped(str(offsets))}"
    expected = math.prod(shape) * BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        return f"shape {shape} of {dtype} needs {expected} bytes, the offsets span {offsets[1] - offsets[0]}"
    return None


def dtype_name(array: mx.array) -> str:
    """The safetensors name of an array's dtype."""
    return NAMES[array.dtype]


def mlx_dtype(name: str) -> mx.Dtype:
    """The MLX dtype of a safetensors dtype name."""
    return _MLX[name]
