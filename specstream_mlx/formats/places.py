"""Where a model or an adapter lies: a directory here, or a repository of the Hugging Face hub.

One rule tells them apart, for every command and for the library (``locate``). A repository's small configuration
files come first, so that a model that cannot be run is refused before its weights are downloaded; then come only the
files that are read. Nothing here imports MLX.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specstream_mlx.errors import InvalidInputError, UsageError

CONFIGURATION = ("config.json", "adapter_config.json", "specstream_config.json")
TOKENIZER = ("tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jinja")
MODEL_WEIGHTS = ("model*.safetensors", "specstream.safetensors", "adapters/adapters.safetensors")
ADAPTER_WEIGHTS = ("specstream.safetensors", "adapters.safetensors", "adapters/adapters.safetensors")
# Other forms of the same weights, with configurations of their own.
_OTHER_FORMS = ("original/*", "consolidated*", "onnx/*", "metal/*")

_NAME = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_ID = re.compile(rf"{_NAME}/{_NAME}", re.ASCII)
_BARE_ID = re.compile(_NAME, re.ASCII)
_REVISION = re.compile(r"[^\s@]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_ID = 96  # characters, a rule of the hub


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub, at a branch, tag or commit; None is its main branch."""

    name: str
    revision: str | None = None


def is_repository_id(text: str) -> bool:
    """Whether a text has the form ``organisation/name``, by the rules of the Hugging Face hub."""
    return bool(_ID.fullmatch(text)) and _follows_hub_rules(text)


def locate(place: str | Path, revision: str | None = None, *, bare_names: bool = False) -> Path | Repository:
    """Tell a directory from a repository; nothing is downloaded.

    A directory that exists is one. ``organisation/name``, or ``organisation/name@revision``, is a repository when
    nothing here has that path and no directory here is called ``organisation``: a mistyped path is not a download.

    Args:
        place: a directory or a repository id; a ``Path`` is never a repository.
        revision: branch, tag or commit of a repository.
        bare_names: accept a repository id without an organisation too, such as ``gpt2``, as older adapters record it.

    Raises:
        InvalidInputError: neither an existing directory nor a repository id.
        UsageError: a revision of a directory, or two revisions.
    """
    text = str(place)
    if isinstance(place, str) and not text.strip():
        raise InvalidInputError("empty; give a directory or a repository id")
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            if revision is not None:
                raise UsageError(f"revision is {revision!r}, and {text} is a directory, which has none; drop it")
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:  # a null byte, a name that is too long, a loop of links
        raise InvalidInputError(f"{_printable(text)}: cannot be read ({_reason(error)}); give a directory") from error
    if exists:
        raise InvalidInputError(f"{_printable(text)} is not a directory; give the directory that holds config.json")
    repository = _repository(text, revision, bare_names) if isinstance(place, str) else None
    if repository is None:
        raise InvalidInputError(
            f"{_printable(text)}: no such directory; give a model directory, or a repository id such as org/name"
        )
    return repository


def resolve(
    place: str | Path,
    revision: str | None = None,
    *,
    judge: Callable[[Path], object] | None = None,
    weights: Sequence[str] = MODEL_WEIGHTS,
    code: bool = False,
) -> Path:
    """The directory of a model or an adapter: a local one as it is, a repository's from the cache or a download.

    Args:
        place: as for ``locate``.
        revision: as for ``locate``.
        judge: called with the directory, of a repository before its weights are there; raises when it is not wanted.
        weights: patterns of the files of weights.
        code: also download Python files, which a model that the user trusts may need.

    Raises:
        InvalidInputError: a local-looking path that is no directory, or a repository that cannot be had.
        UsageError: as for ``locate``.
    """
    found = locate(place, revision)
    if isinstance(found, Repository):
        return fetch(found, judge=judge, weights=weights, code=code)
    if judge is not None:
        judge(found)
    return found


def fetch(
    repository: Repository,
    *,
    judge: Callable[[Path], object] | None = None,
    weights: Sequence[str] = MODEL_WEIGHTS,
    code: bool = False,
) -> Path:
    """The directory of a repository's files, from the cache or the hub; arguments and errors as ``resolve``."""
    directory = download(repository, CONFIGURATION)
    if judge is not None:
        judge(directory)
    if _COMMIT.fullmatch(directory.name):  # a branch may move between two downloads
        repository = Repository(repository.name, directory.name)
    return download(repository, ("*.json", "*.jsonl", *TOKENIZER, *weights, *(("*.py",) if code else ())))


def download(repository: Repository, patterns: Sequence[str]) -> Path:
    """The directory with those files of a repository, from the cache or the hub.

    Raises:
        InvalidInputError: the repository cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_OTHER_FORMS),
        )
    except Exception as error:  # the hub raises many kinds: offline, missing, gated, bad revision
        at = f" at revision {repository.revision}" if repository.revision is not None else ""
        raise InvalidInputError(
            f"{repository.name}: neither a directory nor a repository that can be downloaded{at} ({_reason(error)}); "
            "give a local directory, or check the name, the network and `hf auth login`"
        ) from error
    return Path(found)


def _repository(text: str, revision: str | None, bare_names: bool) -> Repository | None:
    name, at, own_revision = text.partition("@")
    if at and not _REVISION.fullmatch(own_revision):
        return None
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError(f"revision is {revision!r}, expected a branch, tag or commit of the repository")
    if at and revision is not None and revision != own_revision:
        raise UsageError(f"revision is {revision!r}, and {text} names {own_revision!r}; drop one")
    is_id = is_repository_id(name) or (bare_names and bool(_BARE_ID.fullmatch(name)) and _follows_hub_rules(name))
    if not is_id or ("/" in name and Path(name.split("/")[0]).is_dir()):
        return None
    return Repository(name, own_revision or revision)


def _follows_hub_rules(text: str) -> bool:
    return len(text) <= _LONGEST_ID and not any(part in text for part in ("--", "..")) and not text.endswith(".git")


def _reason(error: Exception) -> str:
    """What an error says, in one printable line."""
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in text)[:400]


def _printable(text: str) -> str:
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return plain if len(plain) <= 160 else f"{plain[:80]}...{plain[-60:]}"
