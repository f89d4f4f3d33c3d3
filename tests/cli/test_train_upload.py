"""``train --upload-repo`` on a hub that is not there: what is checked before, called, kept and said."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from specstream_mlx.formats.adapter_directory import read_adapter
from tests.training.training_cases import save_base, write_rows

REPO = "someone/streams"


class Hub:
    """Stands in for ``huggingface_hub.HfApi``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()
        self.failure: BaseException | None = None

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, **call: Any) -> None:
        self.calls.append(("create_repo", call))

    def upload_folder(self, **call: Any) -> None:
        self.calls.append(("upload_folder", call))
        self.files = {path.name for path in Path(call["folder_path"]).iterdir()}
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    return fake


@pytest.fixture
def train(run, tmp_path):
    base, data = save_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 12)
    words = ["--gamma", "2", "--rank", "2", "--iters", "2", "--val-batches", "0", "--adapter-path", tmp_path / "out"]

    def invoke(*more):
        return run("train", "--model", str(base), "--data", str(data), *map(str, [*words, *more]))

    return invoke


def test_the_finished_adapter_is_uploaded(train, hub, tmp_path):
    result = train("--upload-repo", REPO)
    assert result.code == 0, result.stderr
    assert hub.calls == [
        ("create_repo", {"repo_id": REPO, "exist_ok": True}),
        ("upload_folder", {"repo_id": REPO, "repo_type": "model", "folder_path": str(tmp_path / "out")}),
    ]
    assert hub.files >= {"README.md", "specstream.safetensors", "specstream_config.json", "training_log.jsonl"}
    assert f"uploaded {tmp_path / 'out'} to {REPO}" in result.stderr


def test_a_failed_upload_keeps_the_adapter_and_says_how_to_try_again(train, hub, tmp_path):
    hub.failure = PermissionError("403 Forbidden: no write access.\n\nCheck your token\x1b[0m.")
    result = train("--upload-repo", REPO, "--quiet")
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.strip().isprintable()
    for words in ("is complete, but", "403 Forbidden", f"try again with `hf upload {REPO} {tmp_path / 'out'}`"):
        assert words in result.stderr
    assert read_adapter(tmp_path / "out")[0].gamma == 2
    hub.failure = KeyboardInterrupt()
    again = train("--upload-repo", REPO, "--quiet", "--overwrite")
    assert (again.code, again.stderr) == (130, "interrupted\n")
    assert read_adapter(tmp_path / "out")[0].gamma == 2


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("streams", None, "--upload-repo: got 'streams', expected a repository id such as org/name"),
        ("a/x..y", None, "--upload-repo: got 'a/x..y', expected a repository id such as org/name"),
        ("a/" + "x" * 99, None, "--upload-repo: "),
        (REPO, "offline", "--upload-repo: HF_HUB_OFFLINE is set, so nothing can be uploaded"),
        (REPO, "token", "--upload-repo: no access token; log in with `hf auth login` or set HF_TOKEN"),
    ],
)
def test_nobody_trains_for_an_upload_that_cannot_begin(name, change, reason, train, hub, tmp_path, monkeypatch):
    if change == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if change == "token":
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = train("--upload-repo", name)
    assert (result.code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert reason in result.stderr
    assert hub.calls == []
    assert not (tmp_path / "out").exists()
