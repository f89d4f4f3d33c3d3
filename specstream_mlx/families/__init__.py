"""What a model family needs beyond stock mlx-lm blocks.

The runtime drives the layers itself and needs four parts of a model: embedding, layers, final norm, LM head. Here is
where each family's parts are found. A family whose embedding is scaled or whose logits are capped gets its own class.
"""

from collections.abc import Mapping
from typing import Any

from mlx_lm.utils import _get_classes

from specstream_mlx.errors import UnsupportedError
from specstream_mlx.families import opt
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.learned_positions import GPT2Family, OPTFamily

FAMILIES: dict[str, type[DecoderFamily]] = {
    "gpt2": GPT2Family,
    "llama": DecoderFamily,
    "mistral": DecoderFamily,
    "opt": OPTFamily,
    "phi3": DecoderFamily,
    "qwen2": DecoderFamily,
    "qwen3": DecoderFamily,
}
# The models that are written here because mlx-lm has none.
OURS: dict[str, tuple[type[Any], type[Any]]] = {"opt": (opt.Model, opt.ModelArgs)}


def check_supported(model_type: object, where: str = "model_type") -> None:
    """Refuse families that are not verified here, before any weight is read.

    Raises:
        UnsupportedError: the family is not among ``FAMILIES``.
    """
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
    classes: tuple[type[Any], type[Any]] = OURS.get(config["model_type"]) or _get_classes(dict(config))
    return classes
