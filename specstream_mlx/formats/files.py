"""Directories, repositories and safetensors files as users have them: found, or refused in one line."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from specstream_mlx.errors import InvalidInputError, UnsupportedError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DOWNLOAD = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]


def resolve(path_or_repo: str | Path) -> Path:
    """A local directory as it is; a repository id through the Hugging Face cache or a download.

    Raises:
        InvalidInputError: a local-looking path that is not a directory, or a repository that cannot be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_repo)
    if path.exists():
        raise InvalidInputError(f"{text}: is a file; give the model's directory")
    looks_local = (
        isinstance(path_or_repo, Path) or text.startswith(".") or (path.parent.is_dir() and path.parent != Path())
    )
    if looks_local or not _REPO_ID.fullmatch(text):
        raise InvalidInputError(f"{text}: no such directory; give an existing one, or a repository id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInputError(
            f"{text}: neither a directory nor a repository that can be downloaded ({reason})"
        ) from error


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Validate a safetensors file's header and extent before anything maps it.

    Returns:
        Name -> (dtype, shape).

    Raises:
        InvalidInputError: not a regular file, empty, truncated, or not safetensors.
    """
    if not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file; restore it")
    if path.stat().st_size == 0:
        raise InvalidInputError(f"{path}: empty file; restore or download it again")
    try:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise InvalidInputError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull")
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
    except SafetensorError as error:
        raise InvalidInputError(f"{path}: damaged safetensors file ({error}); download or convert it again") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error})") from error


def load_error(path: Path, error: Exception, what: str = "model") -> Exception:
    """One of ours for whatever mlx-lm raised, in one line."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if "not supported" in reason or "model_file" in reason or "trust_remote_code" in reason:
        return UnsupportedError(f"{path}: {reason}")
    return InvalidInputError(f"{path}: {what} cannot be loaded ({type(error).__name__}: {reason})")
