"""Remembers what an output was made from, so that a step whose output is up to date is left out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(*paths: Path) -> str:
    """The sha256 of files, and of all files under directories, names included."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            total.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def is_current(output: Path, made_from: dict[str, Any]) -> bool:
    """Whether an output exists and was made from exactly this."""
    return output.exists() and _stamp(output).exists() and json.loads(_stamp(output).read_text()) == made_from


def write_stamp(output: Path, made_from: dict[str, Any]) -> None:
    """Note beside an output what it was made from."""
    _stamp(output).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


def _stamp(output: Path) -> Path:
    return output.with_name(f"{output.name}.made_from.json")
