"""PyTorch pickles, where the user allows them: only tensors come out, as a temporary validated safetensors file.

A pickle is a program. It is read by ``torch.load(weights_only=True)``, which rebuilds tensors and refuses every other
call, and only after the zip around it has been found to hold no more than the file does. What comes out is written to
a private temporary directory, so that everything after this module sees a safetensors file under the pickle's name.
"""

import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.formats.messages import at, escaped, refuse
from specstream_mlx.formats.safetensors import TensorFile, open_tensors
from specstream_mlx.formats.tensor_writer import Entry, TensorOut, write_tensors

MIN_TORCH = (2, 10)  # earlier ones let a crafted file past weights_only (CVE-2025-32434, CVE-2026-24747)
MAX_PROGRAM = 100_000_000  # bytes of data.pkl: names and shapes, no values
WRAPPERS = ("state_dict", "model", "module")
RESAVE = "load it in PyTorch yourself and save it as safetensors"
_DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Pickles:
    """A context that opens pickles; leaving it removes what was written."""

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._scratch: Path | None = None
        self._opened: dict[Path, TensorFile] = {}
        self.notes: list[str] = []

    def __enter__(self) -> "Pickles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    @property
    def allowed(self) -> bool:
        return self._allowed

    def open(self, path: Path) -> TensorFile:
        """The tensors of a pickle, under its own path.

        Raises:
            UsageError: PyTorch is missing or too old, or there is no room for the copy.
            UnsupportedError: pickles are not allowed, or this is a kind of archive that is not read.
            InvalidInputError: damaged, hostile, or not a flat dictionary of dense tensors.
        """
        if not self._allowed:
            raise UnsupportedError(
                f"{path}: a pickle can run code and is not opened; save it as safetensors (in PEFT: "
                "save_pretrained(..., safe_serialization=True)), or convert with --allow-pickle"
            )
        if path not in self._opened:
            torch = _torch()
            _check_archive(path)
            tensors, note = _state_dict(path, _load(torch, path))
            _check_tensors(torch, path, tensors)
            self._opened[path] = self._as_safetensors(torch, path, tensors)
            if note:
                self.notes.append(note)
        return self._opened[path]

    def _as_safetensors(self, torch: Any, path: Path, tensors: Mapping[str, Any]) -> TensorFile:
        try:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="specstream-"))
            copy = self._scratch / f"{len(self._opened)}.safetensors"
            outs = [_tensor_out(torch, name, tensor) for name, tensor in tensors.items()]
            write_tensors(copy, outs, {"format": "pt"})
        except OSError as error:
            raise UsageError(
                f"{path}: no temporary copy can be written in {tempfile.gettempdir()} ({error.strerror}); set "
                "TMPDIR to a directory with room for it"
            ) from error
        return replace(open_tensors(copy), path=path, data=copy)


NO_PICKLES = Pickles(allowed=False)


def _torch() -> Any:
    install = "install it with pip install 'torch>=2.10', or save the file as safetensors elsewhere"
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"--allow-pickle needs PyTorch, which is not installed; {install}") from error
    numbers = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MIN_TORCH:
        raise UsageError(
            f"--allow-pickle needs PyTorch >= 2.10, this is {torch.__version__}, whose safe loading has known holes; "
            f"{install}"
        )
    return torch


def _check_archive(path: Path) -> None:
    """Refuse anything but the plain zip that ``torch.save`` writes, before a byte of it is unpacked."""
    if not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(b"version "):
            raise InvalidInputError(f"{path}: this is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if not start.startswith(b"PK\x03\x04"):
            if size == 0:
                raise InvalidInputError(f"{path}: the file is empty; download or save it again")
            raise UnsupportedError(f"{path}: not the zip archive that torch.save writes since 1.6; {RESAVE}")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(f"{path}: a damaged zip archive ({reason}); download or save it again") from error
    names = [entry.filename for entry in entries]
    problem = None
    if len(set(names)) != len(names):
        problem = "two entries of the same name"
    elif any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        problem = "compressed entries, which torch.save never writes"
    elif sum(entry.file_size for entry in entries) > size:
        problem = f"entries of {sum(entry.file_size for entry in entries)} bytes in a file of {size}"
    programs = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
    if problem is None and len(programs) != 1:
        problem = f"{len(programs)} entries named data.pkl, expected 1"
    elif problem is None and programs[0].file_size > MAX_PROGRAM:
        problem = f"a data.pkl of {programs[0].file_size} bytes"
    if problem is not None:
        raise InvalidInputError(f"{path}: {problem}; it is not what torch.save writes, {RESAVE}")
    if any(name.split("/")[-1] == "constants.pkl" or "/code/" in name for name in names):
        raise UnsupportedError(f"{path}: a TorchScript program, not a dictionary of tensors; {RESAVE}")


def _load(torch: Any, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises whatever a damaged or hostile program provokes
        text = " ".join(str(error).split())
        named = re.search(r"GLOBAL ([\w.]+)", text)
        if named is not None:
            raise InvalidInputError(
                f"{path}: holds {escaped(named[1])}, which is neither a tensor nor a container of tensors; nothing was "
                f"run. If the file is to be trusted, {RESAVE}"
            ) from error
        # PyTorch's own advice is to load it unsafely, which is not repeated.
        told = re.search(r"WeightsUnpickler error: ([^.]*)", text)
        reason = told[1] if told else "not plain tensors" if "weights_only" in text else text[:200]
        raise InvalidInputError(f"{path}: PyTorch cannot read it safely ({escaped(reason)}); {RESAVE}") from error


def _state_dict(path: Path, held: Any) -> tuple[dict[str, Any], str | None]:
    """The flat dictionary of tensors, alone or below one of the usual names."""
    note = None
    if isinstance(held, dict):
        inner = [name for name in WRAPPERS if isinstance(held.get(name), dict)]
        if len(inner) == 1:
            left = sorted(escaped(str(name)) for name in held if name != inner[0])
            note = f"{path.name}: the tensors below {inner[0]!r} are used" + (
                f"; not read: {', '.join(left[:10])}" if left else ""
            )
            held = held[inner[0]]
    if not isinstance(held, dict) or not held:
        raise InvalidInputError(f"{path}: holds a {type(held).__name__}, expected a dictionary of tensors; {RESAVE}")
    problems = [
        f"{path}: holds {escaped(repr(name))}: a {type(value).__name__}, expected a tensor under a name; {RESAVE}"
        for name, value in held.items()
        if not isinstance(name, str) or not _is_tensor(value)
    ]
    refuse(problems)
    return held, note


def _is_tensor(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("layout", "untyped_storage", "dtype"))


def _dtype(tensor: Any) -> str:
    return _DTYPES[str(tensor.dtype).removeprefix("torch.")]


def _check_tensors(torch: Any, path: Path, tensors: Mapping[str, Any]) -> None:
    problems, total, size = [], 0, path.stat().st_size
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        problem = None
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            problem = "not a plain dense tensor"
        elif str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            problem = f"dtype {tensor.dtype} is not supported; save it as bfloat16 or float32"
        elif num_bytes > tensor.untyped_storage().nbytes():
            problem = f"shape {tuple(tensor.shape)} repeats the values of a smaller storage"
        if problem:
            problems.append(f"{at(path, name)}: {problem}")
        total += num_bytes
    refuse(problems)
    if total > 2 * size:  # tied weights are stored once and named twice; more is a bomb
        raise InvalidInputError(f"{path}: declares {total} bytes of tensors, the file has {size}; {RESAVE}")


def _tensor_out(torch: Any, name: str, tensor: Any) -> TensorOut:
    entry = Entry(name, _dtype(tensor), tuple(tensor.shape))
    return TensorOut((entry,), lambda: [(_to_mlx(torch, tensor),)])


def _to_mlx(torch: Any, tensor: Any) -> mx.array:
    value = tensor.detach()
    if value.dtype == torch.bfloat16:
        return mx.array(value.view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(value.numpy())
