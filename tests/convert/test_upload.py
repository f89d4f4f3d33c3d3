"""``--upload-repo`` on a hub that is not there: what is called, and what is said and kept when it fails."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from convert_cases import Case

from specstream_convert import convert
from specstream_mlx.errors import UsageError

REPO = "someone/streams"


class Hub:
    """Stands in for ``huggingface_hub.HfApi``; ``failures`` maps a method to what it raises."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failures: dict[str, BaseException] = {}
        self.complete = False

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, **call: Any) -> None:
        self._record("create_repo", call)

    def upload_folder(self, **call: Any) -> None:
        self.complete = (Path(call["folder_path"]) / "conversion_report.json").exists()
        self._record("upload_folder", call)

    def _record(self, name: str, call: dict[str, Any]) -> None:
        self.calls.append((name, call))
        if name in self.failures:
            raise self.failures[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_the_complete_output_is_uploaded(case: Case, hub: Hub) -> None:
    """Only when it is in place and verified, README.md and report included; an existing repository is used."""
    convert(case.options(upload_repo=REPO))
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": REPO, "exist_ok": True}
    assert hub.calls[1][1] == {"repo_id": REPO, "repo_type": "model", "folder_path": str(case.out)}
    assert hub.complete
    assert (case.out / "README.md").exists()


def test_nothing_is_uploaded_without_the_flag(case: Case, hub: Hub) -> None:
    convert(case.options())
    assert hub.calls == []


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    "failure",
    [
        huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
        ConnectionError("[Errno -2] Name or service not known"),
        PermissionError("403 Forbidden: you have no write access.\n\n(Request ID: x)\nCheck your token\x1b[0m."),
        huggingface_hub.errors.HFValidationError("Repo id must use alphanumeric chars: 'someone/streams'."),
    ],
    ids=["offline", "no network", "forbidden", "bad name"],
)
def test_a_failed_upload_keeps_the_output(case: Case, hub: Hub, method: str, failure: BaseException) -> None:
    """One printable line that says that the output is complete, where it is, and what went wrong."""
    hub.failures[method] = failure
    with pytest.raises(UsageError) as caught:
        convert(case.options(upload_repo=REPO))
    message = str(caught.value)
    assert message.isprintable()
    for words in (str(case.out), "is complete", REPO, str(failure).split("\n")[0][:60], f"hf upload {REPO} {case.out}"):
        assert words in message
    kept = {path.name: path.read_bytes() for path in case.out.iterdir()}
    assert {path.name for path in case.root.iterdir()} == {"adapter", "base", "out"}
    hub.failures.clear()
    convert(case.options(upload_repo=REPO, overwrite=True))
    assert {path.name: path.read_bytes() for path in case.out.iterdir()} == kept


def test_ctrl_c_during_the_upload(case: Case, hub: Hub) -> None:
    hub.failures["upload_folder"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        convert(case.options(upload_repo=REPO))
    assert (case.out / "conversion_report.json").exists()


@pytest.mark.parametrize("name", ["streams", "a/b/c", "../x", "a/", "", "a b/c", "a/b\n", "a/-b", "a/x..y"])
def test_a_bad_name_is_refused_before_the_work(case: Case, hub: Hub, name: str) -> None:
    with pytest.raises(UsageError, match="--upload-repo"):
        convert(case.options(upload_repo=name))
    assert hub.calls == []
    assert not case.out.exists()


def test_a_dry_run_uploads_nothing(case: Case, hub: Hub) -> None:
    with pytest.raises(UsageError, match="--upload-repo"):
        convert(case.options(upload_repo=REPO, dry_run=True))
    assert hub.calls == []


def test_what_can_be_known_before_the_work_is(case: Case, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when: a conversion runs whose upload cannot begin."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        convert(case.options(upload_repo=REPO))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no access token; log in with `hf auth login` or set HF_TOKEN"):
        convert(case.options(upload_repo=REPO))
    assert hub.calls == []
    assert not case.out.exists()
