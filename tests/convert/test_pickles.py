"""``--allow-pickle``: the same output as from safetensors, and nothing of a hostile file is ever run."""

import json
import os
import pickle
import shlex
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from convert_cases import ADAPTER, STREAMS, Case, Q

from specstream_convert import convert
from specstream_convert.files import pickles
from specstream_mlx.errors import InvalidInputError, SpecStreamError, UnsupportedError, UsageError, VerificationError
from specstream_mlx.formats.fingerprint import sha256_file

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

WEIGHTS = f"adapter/{ADAPTER}"


class Runs:
    """A pickle of it runs a command when it is read by the plain unpickler."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files; nothing may be left in it."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


def pickled(case: Case, name: str = "adapter_model.bin", wrap: Callable[[Any], Any] = lambda held: held) -> Path:
    """Replace the adapter's file by ``torch.save`` of the same tensors."""
    held = load_file(case.root / WEIGHTS)
    held[STREAMS] = torch.nn.Parameter(held[STREAMS])  # as a raw state_dict may hold it
    (case.root / WEIGHTS).unlink()
    torch.save(wrap(held), case.adapter / name)
    return case.adapter / name


def same_output(out: Path, expected: Path) -> None:
    for file in ("model.safetensors", "specstream.safetensors"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()


@pytest.fixture
def expected(pristine: dict[str, Case], tmp_path: Path) -> Path:
    case = pristine["shared"].copy(tmp_path / "plain")
    convert(case.options())
    return case.out


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_adapter(case: Case, expected: Path, name: str) -> None:
    path = pickled(case, name)
    report = convert(case.options(allow_pickle=True)).to_dict()
    same_output(case.out, expected)
    assert report["input_hashes"][f"adapter/{name}"] == sha256_file(path)
    assert f"{Q}.lora_A.weight" in {row["tensor"] for row in report["tensors"] if row["file"] == name}
    assert ".safetensors" not in str([row["file"] for row in report["tensors"] if row["file"] != "model.safetensors"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_below_a_name(case: Case, expected: Path, wrapper: str) -> None:
    pickled(case, wrap=lambda held: {wrapper: held, "epoch": 3, "optimizer": {"lr": 0.1}})
    report = convert(case.options(allow_pickle=True))
    same_output(case.out, expected)
    assert any("not read: epoch, optimizer" in note for note in report.notes)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base(case: Case, dtype: Any, shards: int) -> None:
    """A base in pytorch_model*.bin gives what the same base in safetensors gives."""
    held = {name: value.to(dtype) for name, value in load_file(case.base / "model.safetensors").items()}
    held["lm_head.weight"] = held["lm_head.weight"].T.contiguous().T  # not contiguous, as torch allows
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in held.items()}, case.base / "model.safetensors")
    convert(case.options(mlx_path=case.root / "expected"))
    (case.base / "model.safetensors").unlink()
    names = sorted(held)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" if shards > 1 else "pytorch_model.bin"
        torch.save({name: held[name] for name in names[i::shards]}, case.base / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (case.base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = convert(case.options(allow_pickle=True))
    found = {n: v for file in sorted(case.out.glob("model*.safetensors")) for n, v in mx.load(str(file)).items()}
    wanted = mx.load(str(case.root / "expected" / "model.safetensors"))
    assert set(found) == set(wanted)
    assert all(found[name].dtype == wanted[name].dtype and mx.array_equal(found[name], wanted[name]) for name in wanted)
    assert f"base/{sorted(weight_map.values())[0]}" in report.input_hashes


def test_tied_weights_share_storage(tmp_path: Path) -> None:
    """torch.save stores a tied head once and names it twice."""
    from convert_cases import make_case

    case = make_case(tmp_path / "tied", tie=True)
    held = load_file(case.base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    (case.base / "model.safetensors").unlink()
    torch.save(held, case.base / "pytorch_model.bin")
    report = convert(case.options(allow_pickle=True))
    assert any(fate.fate.startswith("dropped: tied") for fate in report.tensors)


def test_without_the_flag(case: Case) -> None:
    path = pickled(case)
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin: a pickle can run code .*--allow-pickle"):
        convert(case.options())
    path.unlink()


def test_hostile_pickle(case: Case, tmp_path: Path) -> None:
    """What the plain unpickler would run, and did when the file was tried on it, is refused and not run."""
    marker = tmp_path / "marker"
    path = pickled(case, wrap=lambda held: held | {"x": Runs(f"touch {shlex.quote(str(marker))}")})
    with pytest.raises(InvalidInputError, match=r"adapter_model\.bin: holds (posix|nt)\.system") as caught:
        convert(case.options(allow_pickle=True))
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file is as hostile as it was meant to be


def test_trainer_files_are_not_opened(case: Case, expected: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (case.adapter / name).write_bytes(pickle.dumps(Runs(f"touch {shlex.quote(str(marker))}")))
    pickled(case)
    report = convert(case.options(allow_pickle=True))
    same_output(case.out, expected)
    assert not marker.exists()
    assert not any("training_args" in name for name in report.input_hashes)


def legacy(path: Path) -> None:
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


def rezipped(change: Callable[[str, bytes], list[tuple[str, bytes]]], compression: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, body in entries:
                for new_name, new_body in change(name, body):
                    archive.writestr(new_name, new_body)

    return damage


def bomb(path: Path) -> None:
    rezipped(lambda n, b: [(n, b)] + ([("archive/data/9", bytes(10**7))] if n.endswith(".pkl") else []), 8)(path)


def second_program(path: Path) -> None:
    rezipped(lambda n, b: [(n, b)] + ([("other/data.pkl", b)] if n.endswith("data.pkl") else []), 0)(path)


def torchscript(path: Path) -> None:
    rezipped(lambda n, b: [(n, b)] + ([("archive/constants.pkl", b)] if n.endswith("data.pkl") else []), 0)(path)


def overlapping(path: Path) -> None:
    """Claim a gigabyte for the first entry in the central directory."""
    body = bytearray(path.read_bytes())
    at = body.index(b"PK\1\2")
    body[at + 20 : at + 28] = (2**30).to_bytes(4, "little") * 2
    path.write_bytes(body)


def saved(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path)), path)


def expanded(held: Any) -> Any:
    return held | {"x": torch.zeros(1).expand(10**6, 10**6)}


def aliased(held: Any) -> Any:
    value = torch.zeros(4096)
    return held | {f"x{i}": value for i in range(100)}


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (legacy, UnsupportedError, "not the zip archive"),
        (lambda path: path.write_bytes(b""), InvalidInputError, "empty"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), InvalidInputError, "git lfs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), InvalidInputError, "damaged zip"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), InvalidInputError, "damaged zip"),
        (bomb, InvalidInputError, "compressed entries"),
        (overlapping, InvalidInputError, "bytes in a file of"),
        (second_program, InvalidInputError, "2 entries named data.pkl"),
        (torchscript, UnsupportedError, "TorchScript"),
        (saved(lambda held: [1, 2]), InvalidInputError, "holds a list"),
        (saved(lambda held: {}), InvalidInputError, "expected a dictionary"),
        (saved(lambda held: held | {"step": 3}), InvalidInputError, "'step': a int"),
        (saved(lambda held: {3: torch.ones(2)}), InvalidInputError, "holds 3"),
        (saved(lambda held: held | {"x": torch.ones(2).to_sparse()}), InvalidInputError, "bin:x: not a plain dense"),
        (saved(lambda held: held | {"x": torch.ones(2, dtype=torch.float64)}), InvalidInputError, "bin:x: dtype"),
        (saved(expanded), InvalidInputError, "repeats the values"),
        (saved(aliased), InvalidInputError, "declares"),
        (saved(lambda held: held | {STREAMS: held[STREAMS] * torch.nan}), InvalidInputError, "NaN"),
    ],
    ids=[
        "legacy", "empty", "lfs", "cut", "zip header only", "compressed", "overlapping", "two programs", "torchscript",
        "list", "nothing", "number", "integer key", "sparse", "float64", "expanded", "aliased", "nan",
    ],
)  # fmt: skip
def test_refused(case: Case, damage: Callable[[Path], Any], error: type[SpecStreamError], words: str) -> None:
    damage(pickled(case))
    with pytest.raises(error) as caught:
        convert(case.options(allow_pickle=True))
    assert type(caught.value) is error
    assert "adapter_model.bin" in str(caught.value)
    assert words in str(caught.value)
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert not case.out.exists()


def test_fifo(case: Case) -> None:
    pickled(case).unlink()
    os.mkfifo(case.adapter / "adapter_model.bin")
    with pytest.raises(InvalidInputError, match="regular file"):
        convert(case.options(allow_pickle=True))


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu", "odd"])
def test_old_torch(case: Case, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pickled(case)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UsageError, match=r"PyTorch >= 2\.10.*torch>=2\.10"):
        convert(case.options(allow_pickle=True))


def test_no_torch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(case)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="not installed"):
        convert(case.options(allow_pickle=True))


def test_safetensors_needs_no_torch(case: Case, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag alone imports nothing; a pickle beside safetensors stays closed."""
    shutil.copy(case.root / WEIGHTS, case.adapter / "adapter_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    report = convert(case.options(allow_pickle=True))
    same_output(case.out, expected)
    assert any("adapter_model.bin was not opened" in note for note in report.notes)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), VerificationError("wrong")])
def test_the_copy_goes_with_a_failure(case: Case, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    """The ``scratch`` fixture looks for what is left."""
    from specstream_convert import pipeline

    def fail(*_: Any) -> None:
        assert list(Path(tempfile.gettempdir()).iterdir())
        raise failure

    pickled(case)
    monkeypatch.setattr(pipeline, "_verify", fail)
    with pytest.raises(type(failure)):
        convert(case.options(allow_pickle=True))


def test_the_copy_is_private(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pickled(case)
    with pickles.Pickles(allowed=True) as opened:
        file = opened.open(path)
        assert file.data is not None
        assert file.path == path
        assert file.data.parent.stat().st_mode & 0o077 == 0
        assert opened.open(path) is file


def test_no_room_for_the_copy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    pickled(case)
    monkeypatch.setattr(pickles, "write_tensors", full)
    with pytest.raises(UsageError, match=r"No space left on device.*TMPDIR"):
        convert(case.options(allow_pickle=True))
