"""The weight files of a directory: one file, or shards with their index, each tensor in exactly one of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specstream_convert.files.pickles import NO_PICKLES, Pickles
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import at, escaped, refuse
from specstream_mlx.formats.safetensors import TensorFile, open_tensors


@dataclass(frozen=True)
class FileSet:
    """How the files of one set of weights are named: ``{stem}{suffix}``, or ``{stem}-00001-of-00003{suffix}`` ..."""

    stem: str
    suffix: str
    loose: bool = False  # mlx-lm reads every file whose name begins with the stem

    @property
    def index_name(self) -> str:
        return f"{self.stem}{self.suffix}.index.json"

    @property
    def pickled(self) -> bool:
        return self.suffix != ".safetensors"

    def present(self, directory: Path) -> list[Path]:
        """The files of this set in ``directory``, in order of their names."""
        between = ".*" if self.loose else r"(-\d{5}-of-\d{5})?"
        pattern = re.compile(rf"{self.stem}{between}{re.escape(self.suffix)}")
        return sorted(file for file in directory.iterdir() if pattern.fullmatch(file.name))

    def is_member(self, name: str) -> bool:
        """Whether an index may name ``name``: the plain name of a file of this set."""
        return ".." not in name and re.fullmatch(rf"{self.stem}[\w.\-]*{re.escape(self.suffix)}", name) is not None

    def shard(self, i: int, total: int) -> str:
        return f"{self.stem}-{i:05d}-of-{total:05d}{self.suffix}"


MODEL = FileSet("model", ".safetensors", loose=True)
PICKLED_MODEL = FileSet("pytorch_model", ".bin")
ADAPTER = FileSet("adapter_model", ".safetensors")
PICKLED_ADAPTERS = (FileSet("adapter_model", ".bin"), FileSet("adapter_model", ".pt"))


def open_shards(directory: Path, files: FileSet = MODEL, pickles: Pickles = NO_PICKLES) -> tuple[TensorFile, ...]:
    """Open a set of weights that is there.

    Raises:
        InvalidInputError: shards missing, superfluous, or contradicting the index; a tensor in two of them.
    """
    present = files.present(directory)
    index = directory / files.index_name
    if index.exists():
        wanted = _index_map(index, files)
        _check_names(index, present, set(wanted.values()))
        opened = _open(present, files, pickles)
        _check_index(index, wanted, opened)
        _check_total(index, opened)
        return opened
    if len(present) > 1:
        match = re.fullmatch(r"-00001-of-(\d{5})", present[0].name.removeprefix(files.stem).removesuffix(files.suffix))
        total = int(match.group(1)) if match else 0
        if [f.name for f in present] != [files.shard(i, total) for i in range(1, total + 1)]:
            raise InvalidInputError(
                f"{directory}: {', '.join(escaped(f.name) for f in present)} without {files.index_name}; loading "
                "would mix them, keep one complete set"
            )
    elif re.fullmatch(rf"{files.stem}-\d{{5}}-of-(?!00001)\d{{5}}{re.escape(files.suffix)}", present[0].name):
        raise InvalidInputError(f"{present[0]}: only one shard of several is here; download the others")
    opened = _open(present, files, pickles)
    twice = _duplicates(opened)
    refuse([f"{at(directory, name)}: in two weight files; keep one" for name in twice])
    return opened


def open_model_shards(directory: Path, pickles: Pickles = NO_PICKLES) -> tuple[TensorFile, ...]:
    """The weights of a model directory: ``model*.safetensors``, else pickles where they are allowed."""
    if MODEL.present(directory):
        return open_shards(directory, MODEL)
    if PICKLED_MODEL.present(directory):
        return open_shards(directory, PICKLED_MODEL, pickles)
    others = sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"{escaped(others[0])} cannot be read, save it as safetensors" if others else "download it again"
    raise InvalidInputError(f"{directory}: no model*.safetensors; {hint}")


def _open(present: list[Path], files: FileSet, pickles: Pickles) -> tuple[TensorFile, ...]:
    return tuple(pickles.open(path) if files.pickled else open_tensors(path) for path in present)


def _index_map(index: Path, files: FileSet) -> dict[str, str]:
    raw = read_json(index)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidInputError(f"{index}: weight_map is not an object of file names; download it again")
    bad = sorted({v for v in weight_map.values() if not files.is_member(v)})
    refuse([f"{index}: {escaped(repr(name))} is not the name of a shard beside it" for name in bad])
    return weight_map


def _check_names(index: Path, present: list[Path], wanted: set[str]) -> None:
    names = {file.name for file in present}
    problems = [f"{index}: names {name}, which is not there; download it again" for name in sorted(wanted - names)]
    problems += [
        f"{index.parent / name}: not named in {index.name}, but would be mixed in; remove it"
        for name in sorted(names - wanted)
    ]
    refuse(problems)


def _check_index(index: Path, wanted: dict[str, str], files: tuple[TensorFile, ...]) -> None:
    held = {(name, file.path.name) for file in files for name in file.tensors}
    listed = set(wanted.items())
    problems = [f"{index}: {escaped(name)} is not in {file}; download it again" for name, file in sorted(listed - held)]
    problems += [
        f"{index}: {escaped(name)} of {file} is not listed; download it again" for name, file in sorted(held - listed)
    ]
    refuse([f"{problem}; download it again" for problem in problems])


def _check_total(index: Path, files: tuple[TensorFile, ...]) -> None:
    metadata = read_json(index).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(info.num_bytes for file in files for info in file.tensors.values())
    if total is not None and total != held:
        raise InvalidInputError(
            f"{index}: total_size is {escaped(repr(total))}, the tensors have {held} bytes; the shards are of another "
            "download, download it again, or correct total_size"
        )


def _duplicates(files: Iterable[TensorFile]) -> list[str]:
    seen: set[str] = set()
    twice = []
    for file in files:
        twice += [name for name in file.tensors if name in seen]
        seen |= set(file.tensors)
    return twice
