"""Safetensors files as users have them: checked, or refused in one line."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from specstream_mlx.errors import InvalidInputError


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
