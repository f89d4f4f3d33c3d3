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
from specstream_mlx.families.refused import REFUSED


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


def check_supported(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuse what is not verified here, by a model's configuration, before any weight is read.

    Raises:
        UnsupportedError: a family that is not among ``FAMILIES``, or settings that it does not run.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedError(
            f"{where}: model_type {model_type!r} {REFUSED[model_type]}; run it with mlx-lm, or choose another model"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    reason = FAMILIES[model_type].refusal(config)
    if reason is not None:
        raise UnsupportedError(
            f"{where}: this model of model_type {model_type!r} {reason}; run it with mlx-lm, or choose another model"
        )


def family_of(base: Any, model_type: str) -> DecoderFamily:
    """The family of a loaded mlx-lm model.

    Raises:
        UnsupportedError: the family, or the model's settings, is not one we have verified.
    """
    check_supported(vars(base.args) | {"model_type": model_type}, "model")
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
