"""``rope_parameters`` of transformers 5 in the form that mlx-lm reads.

mlx-lm takes ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling`` from the top level of ``config.json`` and
falls back to a class default without a word.
"""

from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.messages import escaped

LIFTED = "config.json: rope_parameters lifted to rope_theta and rope_scaling, where mlx-lm reads them"


def lift_rope_parameters(config: dict[str, Any], where: Path) -> bool:
    """Lift ``rope_parameters`` to the top level, in place.

    Returns:
        Whether there were any.

    Raises:
        UnsupportedError: they differ from layer to layer.
        InvalidInputError: the top level says something else.
    """
    nested = config.pop("rope_parameters", None)
    if nested is None:
        return False
    if not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values()):
        raise UnsupportedError(f"{where}: rope_parameters is {escaped(repr(nested))}: one set for all layers expected")
    scaling = dict(nested)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name not in scaling:
            continue
        value = scaling.pop(name)
        if name in config and config[name] != value:
            raise InvalidInputError(
                f"{where}: {name} is {config[name]!r}, but {value!r} in rope_parameters; remove the wrong one"
            )
        config[name] = value
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        config.setdefault("rope_scaling", None)
        return True
    older = config.get("rope_scaling")
    if older is not None and older not in (nested, scaling):
        raise InvalidInputError(f"{where}: rope_scaling and rope_parameters differ; remove the wrong one")
    config["rope_scaling"] = scaling
    return True
