"""What a model family needs beyond stock mlx-lm blocks; one file a family, or a few that hardly differ.

The runtime drives the layers itself and needs four parts of a model: embedding, layers, final norm, LM head. A
family's file says where they are, in mlx-lm and in Hugging Face files, which scales and caps lie around the layers, and
what `convert` must check. Windows and rotary embeddings need no word there: the caches that mlx-lm makes tell the
former, and the seam wraps the latter whatever they are. docs/families.md says how each family is verified.

A file of this directory is a family's when it has a class with ``MODEL_TYPES``; there is no other list. Nothing here
imports MLX until a model is run, because the PyTorch method reads the same names.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.families.recurrent import RECURRENT


def _found() -> Iterator[tuple[str, type[DecoderFamily]]]:
    for file in sorted(pkgutil.iter_modules(__path__, f"{__name__}."), key=lambda file: file.name):
        if file.ispkg:  # models that families name
            continue
        for value in vars(importlib.import_module(file.name)).values():
            if isinstance(value, type) and issubclass(value, DecoderFamily) and value.__module__ == file.name:
                yield from ((model_type, value) for model_type in vars(value).get("MODEL_TYPES", ()))


FAMILIES: dict[str, type[DecoderFamily]] = {}
for _model_type, _family in _found():
    assert _model_type not in FAMILIES, f"two classes run {_model_type}"
    FAMILIES[_model_type] = _family
# The families whose PyTorch fine-tunes are converted.
CONVERTED: dict[str, HuggingFace] = {
    name: family.HUGGING_FACE for name, family in sorted(FAMILIES.items()) if family.HUGGING_FACE is not None
}


def check_supported(model_type: object, where: str = "model_type") -> None:
    """Refuse families that are not verified here, before any weight is read.

    Raises:
        UnsupportedError: the family is not among ``FAMILIES``.
    """
    if model_type in RECURRENT:
        raise UnsupportedError(
            f"{where}: {model_type!r} has layers that fold the past into one state, from which rejected tokens cannot "
            "be taken back; run it with mlx-lm, or choose a model of attention alone"
        )
    if model_type not in FAMILIES:
        raise UnsupportedError(f"{where}: {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def family_of(base: Any, model_type: str) -> DecoderFamily:
    """The family of a loaded mlx-lm model.

    Raises:
        UnsupportedError: the family is not one we have verified.
    """
    check_supported(model_type)
    return FAMILIES[model_type](base)


def model_classes(config: Mapping[str, Any]) -> tuple[type[Any], type[Any]]:
    """The model class and its arguments' class: ours where mlx-lm has none, mlx-lm's for every other family.

    It is what ``mlx_lm.utils.load_model`` takes as ``get_model_classes``.

    Raises:
        ValueError: mlx-lm has no such model.
    """
    family = FAMILIES.get(config["model_type"])
    if family is not None and family.MODEL is not None:
        ours = importlib.import_module(family.MODEL)
        return ours.Model, ours.ModelArgs
    from mlx_lm.utils import _get_classes

    classes: tuple[type[Any], type[Any]] = _get_classes(dict(config))
    return classes
