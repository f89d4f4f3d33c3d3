"""A directory or a repository: one rule, and downloads that read the configuration first."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest

from specstream_mlx import InvalidInputError, UnsupportedError, UsageError, default_model_path, load
from specstream_mlx.formats.places import Repository, is_repository_id, locate, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub with one repository; ``calls`` are (revision, names of the files that were downloaded)."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache = files, cache / "snapshots" / COMMIT
        self.calls: list[tuple[str | None, set[str]]] = []

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=(), ignore_patterns=()):
        assert repo_id == "org/name"
        wanted = set()
        for file in self.files.rglob("*"):
            name = file.relative_to(self.files).as_posix()
            chosen = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and chosen and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.cache / name)
                wanted.add(name)
        self.calls.append((revision, wanted))
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with the bundled model and much that is not read."""
    files = tmp_path / "repository"
    shutil.copytree(default_model_path(), files)
    for name in (
        "original/model.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "pytorch_model.bin",
        "optimizer.safetensors",
        "onnx/model.onnx",
        "modeling.py",
        "vae/diffusion.safetensors",
    ):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(b"x")
    fake = Hub(files, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize("name", ["org/name", "Org-1/na_me.v2", "o/n", "_x/y_", "mlx-community/Llama-3.2-1B-4bit"])
def test_repository_ids(name):
    assert is_repository_id(name)
    assert locate(name) == Repository(name)


NO_IDS = (
    "name a/b/c org/-name org/name. .org/name org/na..me org/na--me org/name.git é/name /org/name org/ /name ~/name "
    "./name org\\name org/name@ org/name@a@b https://huggingface.co/org/name"
)


@pytest.mark.parametrize(
    "name", [*NO_IDS.split(), "org/" + "n" * 93, "org/na me", "org/name@a b", "org/name\n", "", " ", "a\0b"]
)
def test_what_is_no_repository_id_is_not_downloaded(name):
    assert not is_repository_id(name)
    with pytest.raises(InvalidInputError) as caught:
        locate(name)
    assert str(caught.value).isprintable()


def test_revisions():
    assert locate("org/name@v1.0") == locate("org/name", "v1.0") == Repository("org/name", "v1.0")
    assert locate("org/name@refs/pr/3", "refs/pr/3") == Repository("org/name", "refs/pr/3")
    with pytest.raises(UsageError, match=r"revision is 'v2', and org/name@v1 names 'v1'; drop one"):
        locate("org/name@v1", "v2")
    with pytest.raises(UsageError, match=r"revision is 'a b', expected a branch, tag or commit"):
        locate("org/name", "a b")


def test_a_directory_comes_first_and_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/name@v1", "plain"):
        Path(name).mkdir(parents=True)
        assert locate(name) == Path(name)
        with pytest.raises(UsageError, match=f"revision is 'v1', and {name} is a directory, which has none"):
            locate(name, "v1")
    for mistyped in ("org/nmae", "org/name@v2"):
        with pytest.raises(InvalidInputError, match="no such directory"):
            locate(mistyped)


def test_a_name_without_an_organisation_only_where_asked_for():
    assert locate("gpt2", bare_names=True) == Repository("gpt2")
    assert locate("gpt2@main", bare_names=True) == Repository("gpt2", "main")
    with pytest.raises(InvalidInputError):
        locate("gpt2")


def test_only_what_is_read_is_downloaded_and_the_configuration_first(hub):
    model, _ = load("org/name", revision="main")
    assert model.gamma == 4
    (first_revision, first), (second_revision, second) = hub.calls
    assert (first_revision, first) == ("main", {"config.json", "specstream_config.json"})
    assert second_revision == COMMIT  # whatever "main" is by then
    assert {"model.safetensors", "specstream.safetensors", "tokenizer.json", "samples.jsonl"} <= second
    kept = {name for name in second if name.endswith((".safetensors", ".py", ".bin", ".pth", ".onnx"))}
    assert kept == {"model.safetensors", "specstream.safetensors"}
    assert not any(name.startswith("original/") for name in second)


def test_code_is_downloaded_only_when_it_is_trusted(hub):
    load("org/name@main", trust_remote_code=True)
    assert "modeling.py" in hub.calls[1][1]


def test_a_model_that_cannot_be_run_is_refused_before_its_weights_are_downloaded(hub):
    config = json.loads((hub.files / "config.json").read_text())
    (hub.files / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedError, match="'mamba' has layers that fold the past into one state"):
        load("org/name")
    assert [names for _, names in hub.calls] == [{"config.json", "specstream_config.json"}]


def test_a_peft_repository_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    for file in list(hub.files.iterdir()):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (hub.files / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (hub.files / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="a PEFT adapter, not a model; run specstream-mlx convert"):
        load("org/name")
    with pytest.raises(InvalidInputError, match="a PEFT checkpoint; run specstream-mlx convert --adapter-only"):
        load(adapter="org/name")
    assert [names for _, names in hub.calls] == [{"adapter_config.json"}] * 2


def test_an_adapter_repository_brings_its_own_weights_alone(hub):
    (hub.files / "adapters").mkdir()
    for name in ("adapters.safetensors", "adapters/adapters.safetensors", "adapters/0000100_adapters.safetensors"):
        (hub.files / name).write_bytes(b"x")
    from specstream_mlx.formats.places import ADAPTER_WEIGHTS

    resolve("org/name", weights=ADAPTER_WEIGHTS)
    names = {name for name in hub.calls[1][1] if name.endswith(".safetensors")}
    assert names == {"specstream.safetensors", "adapters.safetensors", "adapters/adapters.safetensors"}


def test_two_names_of_one_adapter():
    with pytest.raises(UsageError, match="adapter and adapter_path are two names of one argument"):
        load(adapter="a/b", adapter_path="a/b")


def test_a_revision_of_the_bundled_model():
    with pytest.raises(UsageError, match=r"revision is 'main', and .* is a directory"):
        load(revision="main")
