"""What a training records of its base."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specstream_mlx.formats.fingerprint import fingerprint
from specstream_mlx.models.model import SpecStreamModel


def describe_base(config: Mapping[str, Any], name: str, model: SpecStreamModel) -> dict[str, Any]:
    """The ``base_model`` block of ``specstream_config.json``, with a fingerprint where the family has a tensor for it.

    Args:
        config: the base's ``config.json``.
        name: repository id, or the directory's name.
        model: the loaded base.
    """
    base = {"name_or_path": name} | model.family.describe(config)
    tensor = model.family.fingerprint_tensor(config)
    if tensor is None:
        return base
    weight: mx.array = dict(tree_flatten(model.base.parameters()))[tensor]
    return base | {"fingerprint": fingerprint(tensor, weight)}
