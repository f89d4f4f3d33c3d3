"""Draft heads read from an adapter directory: Medusa, Hydra, EAGLE, EAGLE-3."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from specstream_mlx.drafters.head import BaseSizes, Head
from specstream_mlx.drafters.heads import HEADS
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.formats.adapter_directory import read_tensors
from specstream_mlx.formats.base_model import block_problems
from specstream_mlx.formats.config import BASE_SIZES, read_json
from specstream_mlx.formats.drafter_config import DRAFTER_CONFIG, DRAFTER_WEIGHTS, DrafterConfig
from specstream_mlx.formats.safetensors import FLOATS, check_safetensors

INTEGERS = ("I32", "I64")


def read_drafter_config(directory: Path) -> DrafterConfig:
    """The configuration of a head of a kind that we run.

    Raises:
        InvalidInputError: a missing or damaged file.
        UnsupportedError: a newer version, or a kind that is not known.
    """
    where = directory / DRAFTER_CONFIG
    config = DrafterConfig.from_dict(read_json(where), str(where))
    if config.kind not in HEADS:
        raise UnsupportedError(f"{where}: kind is {config.kind!r}, expected one of {', '.join(HEADS)}")
    return config


def read_head(directory: Path, base: nn.Module, family: DecoderFamily) -> Head:
    """Read a draft head for a base; every tensor is checked by name, shape and type before it is used.

    Raises:
        InvalidInputError: missing, damaged or mismatched files, or a head of another base.
        UnsupportedError: a kind or a variant that we do not run.
    """
    config, where = read_drafter_config(directory), directory / DRAFTER_CONFIG
    _check_base(config, base, family, where)
    head = HEADS[config.kind].from_settings(config.settings, sizes_of(base, family), str(where))
    path = directory / DRAFTER_WEIGHTS
    check_tensors(head, path)
    put_tensors(head, read_tensors(path), family.dtype)
    return head


def _check_base(config: DrafterConfig, base: nn.Module, family: DecoderFamily, where: Path) -> None:
    """The head's base block against the base at hand: sizes, and the fingerprint when both sides have one."""
    sizes = vars(base.args)
    marked = family.fingerprint_tensor(sizes)
    problems = block_problems(
        config.base_model,
        where,
        {key: family.size(sizes, key) for key in BASE_SIZES},
        lambda name: dict(tree_flatten(base.parameters()))[name] if name == marked else None,
        what=f"the {config.kind} weights",
        hint="give the base that the head was trained on",
    )
    if problems:
        raise InvalidInputError("\n".join(problems))


def sizes_of(base: nn.Module, family: DecoderFamily) -> BaseSizes:
    """What a head needs to know of a base."""
    sizes = vars(base.args)
    return BaseSizes(len(family.layers), family.size(sizes, "hidden_size"), family.size(sizes, "vocab_size"))


def check_tensors(head: Head, path: Path) -> None:
    """Compare a file's header with what a head needs.

    Raises:
        InvalidInputError: every tensor that is missing, unknown, or of another shape or type.
    """
    expected: dict[str, mx.array] = dict(tree_flatten(head.weights.parameters()))
    found = check_safetensors(path)
    problems = [f"{path}:{name}: missing" for name in expected if name not in found]
    for name, info in found.items():
        if name not in expected:
            problems.append(f"{path}:{name}: not expected by {DRAFTER_CONFIG}")
            continue
        types = INTEGERS if mx.issubdtype(expected[name].dtype, mx.integer) else FLOATS
        if info.dtype not in types:
            problems.append(f"{path}:{name}: dtype {info.dtype}, expected one of {', '.join(types)}")
        elif info.shape != expected[name].shape:
            shape = expected[name].shape
            problems.append(f"{path}:{name}: shape {info.shape}, {DRAFTER_CONFIG} and the base need {shape}")
    if problems:
        raise InvalidInputError("\n".join(problems))


def put_tensors(head: Head, tensors: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Give a head its weights, in the base's type; whole numbers stay so."""
    types = {
        name: mx.int32 if mx.issubdtype(value.dtype, mx.integer) else dtype
        for name, value in tree_flatten(head.weights.parameters())
    }
    head.weights.update(tree_unflatten([(name, tensors[name].astype(kind)) for name, kind in types.items()]))
    head.weights.eval()
