"""Digests: of a file, and the mark of one tensor, which tells bases of equal shape apart.

The mark knows a base again in another dtype. A base is copied in F32, BF16 and F16, so it holds the digest of the
tensor as it is and of its two roundings. The tensor at hand is the same one when the digests agree, or when one of the
two is exactly the other one rounded. Two unequal tensors that merely round to the same values are not the same:
nothing was rounded on the way.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PIECE = 1 << 22  # bytes that are hashed together
ROUNDED = {"sha256_bf16": mx.bfloat16, "sha256_f16": mx.float16}


def tensor_sha256(value: mx.array) -> str:
    """The digest of a tensor as F32 little-endian."""
    return hashlib.sha256(np.array(value.astype(mx.float32)).astype("<f4").tobytes()).hexdigest()


def fingerprint(tensor: str, value: mx.array) -> dict[str, str]:
    """The mark of ``value``, the tensor called ``tensor``, as ``specstream_config.json`` records it."""
    rounded = {name: tensor_sha256(value.astype(dtype)) for name, dtype in ROUNDED.items()}
    return {"tensor": tensor, "sha256": tensor_sha256(value), **rounded}


def is_marked(mark: dict[str, Any], value: mx.array) -> bool:
    """Whether ``value`` is the tensor that ``mark`` was made of, rounded or not.

    A mark that holds only ``sha256`` knows the tensor itself and, if it was a rounded copy, the original.
    """
    digest, recorded = tensor_sha256(value), str(mark.get("sha256")).lower()
    if digest == recorded:
        return True
    for name, dtype in ROUNDED.items():
        theirs = str(mark.get(name, recorded)).lower()
        ours = tensor_sha256(value.astype(dtype))
        if ours == theirs and (ours == digest or theirs == recorded):
            return True
    return False


def sha256_file(path: Path, done: Callable[[int], None] | None = None) -> str:
    """The digest of a file, read in pieces; ``done`` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            if done is not None:
                done(len(piece))
    return digest.hexdigest()
