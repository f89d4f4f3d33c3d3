"""Where calibrations are kept: one file per machine, software and model in the user's cache directory."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.planning.calibration import Calibration

CACHE_VARIABLE = "SPECSTREAM_MLX_CACHE"  # a directory to use instead of the user's


def cache_directory() -> Path:
    """``$SPECSTREAM_MLX_CACHE``, else ``specstream-mlx`` in the system's place for caches."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base).expanduser() / "specstream-mlx"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "specstream-mlx"


def path_for(key: dict[str, Any]) -> Path:
    """The file of a calibration with this key."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_directory() / "calibrations" / f"{name}.json"


def save(calibration: Calibration) -> Path:
    """Write a calibration to its place, whole or not at all.

    Raises:
        UsageError: the cache directory cannot be written.
    """
    path = path_for(dict(calibration.key))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            json.dump(calibration.to_dict(), file, indent=1)
            file.write("\n")
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise UsageError(
            f"{path}: cannot be written ({error.strerror or error}); make the directory writable, or set "
            f"{CACHE_VARIABLE} to another one"
        ) from error
    return path


def find(key: Callable[[], dict[str, Any]], depth: int) -> Calibration | None:
    """The calibration of a key on this machine, if there is one.

    Args:
        key: asked only where there are calibrations at all.
        depth: how far ahead the drafter can guess; its acceptance must have as many depths.

    Raises:
        InvalidInputError: the file at its place is damaged or belongs to something else.
    """
    directory = cache_directory() / "calibrations"
    if not directory.is_dir():
        return None
    wanted = key()
    path = path_for(wanted)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    found = _read(path, changed)
    if dict(found.key) != wanted:
        names = sorted(name for name in wanted if found.key.get(name) != wanted[name])
        differing = ", ".join(names) or "more than it should"
        raise InvalidInputError(f"{path}: made for another {differing}; run specstream-mlx calibrate again")
    if len(found.rates) != depth:
        raise InvalidInputError(
            f"{path}: damaged calibration ({len(found.rates)} depths, this drafter guesses {depth} tokens ahead); run "
            "specstream-mlx calibrate again"
        )
    return found


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Calibration:
    """Read a file as of ``changed``.

    Raises:
        InvalidInputError: not readable, not JSON, or not a calibration.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}: damaged calibration (not JSON: {error}); run specstream-mlx calibrate again"
        ) from error
    return Calibration.from_dict(raw, str(path))
