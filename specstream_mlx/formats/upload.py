"""Finished directories to Hugging Face repositories: what can be known before the work, and the upload itself."""

from pathlib import Path

from specstream_mlx.errors import UsageError
from specstream_mlx.formats.places import is_repository_id


def check_upload(repo: str) -> None:
    """Make sure, before hours of work and without the network, that an upload of the result can begin.

    Raises:
        UsageError: the name is none, the hub is switched off, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    if not is_repository_id(repo):
        raise UsageError(f"--upload-repo: got {repo!r}, expected a repository id such as org/name")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "--upload-repo: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it or drop the option"
        )
    if get_token() is None:
        raise UsageError("--upload-repo: no access token; log in with `hf auth login` or set HF_TOKEN")


def upload(directory: Path, repo: str) -> None:
    """Upload a finished directory.

    Raises:
        UsageError: it failed; the directory stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repo, repo_type="model")
    except Exception as error:  # the hub raises many kinds: offline, forbidden, bad name
        raise UsageError(
            f"{directory} is complete, but uploading to {repo} failed: {_line(error)}; try again with "
            f"`hf upload {repo} {directory}`"
        ) from error


def _line(error: Exception) -> str:
    """What an error says, as one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
