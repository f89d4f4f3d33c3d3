"""``rope_parameters`` of transformers 5 -> ``rope_theta`` and its companions at the top level, where mlx-lm reads them.

mlx-lm falls back to a default base without a word where ``rope_theta`` is missing, so all positions would be wrong.
What mlx-lm would not read after the lifting either is refused. Newer models of mlx-lm read ``rope_parameters``.

    transformers 5                                              mlx-lm
    {"rope_theta", "rope_type": "default"}                      rope_theta
    {"rope_theta", "rope_type": "yarn", "factor", ...}          rope_theta, rope_scaling
    {..., "partial_rotary_factor"}                              partial_rotary_factor (gpt_neox: rotary_pct)
    {"full_attention": {...}, "sliding_attention": {...}}       gemma3: + rope_local_base_freq; olmo3: one base
"""

from collections.abc import Mapping
from typing import Any

from specstream_mlx.errors import InvalidInputError, UnsupportedError

NOTE = "rope_parameters lifted to rope_theta and rope_scaling, where mlx-lm reads them"
# Model types whose mlx-lm model reads ``rope_scaling``; the others know the plain rotary embedding alone.
_ANY_SCALING = (
    *(
        "afmoe",
        "apertus",
        "bailing_moe",
        "dots1",
        "exaone",
        "exaone4",
        "exaone_moe",
        "gemma3_text",
        "gpt_oss",
        "granite",
    ),
    *("granitemoe", "iquestcoder", "llama", "mimo", "minicpm", "mistral", "olmo2", "olmo3", "olmoe", "qwen2"),
    *("qwen3", "seed_oss", "telechat3", "xverse"),
)
_SCALINGS: dict[str, tuple[str, ...]] = {
    "deepseek": ("linear",),
    "internlm2": ("linear", "dynamic"),
    "internlm3": ("linear", "dynamic"),
    "nemotron": ("linear",),
    "phi3": ("linear", "longrope", "su"),
    "qwen2_moe": ("linear",),
    "smollm3": ("linear", "llama3", "yarn", "dynamic"),
    **dict.fromkeys(_ANY_SCALING, ("linear", "llama3", "yarn", "dynamic", "longrope")),
}
_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
_PARTIAL = (
    "bailing_moe",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "nemotron",
    "phi",
    "phi3",
    "solar_open",
    "stablelm",
)  # rotate a part of a head where they are told to
# Models of mlx-lm that read ``rope_parameters`` themselves.
_READ_AS_THEY_ARE = ("gemma4_text", "laguna", "mellum", "ministral3", "muse_glimmer", "spark2_5")
_PER_LAYER = {"full_attention", "sliding_attention"}


def lifted(config: Mapping[str, Any], where: object) -> tuple[dict[str, Any], list[str]]:
    """A model's configuration as mlx-lm reads it, and what to say about it.

    Args:
        config: ``config.json``; the part of a language model in a larger one is lifted in its place.
        where: the file, for messages.

    Raises:
        InvalidInputError: ``rope_parameters`` and the top level contradict each other.
        UnsupportedError: mlx-lm has no place for what they say.
    """
    found = dict(config)
    notes = lift(found, str(found.get("model_type")), where)
    text = found.get("text_config")
    if isinstance(text, dict) and text.get("rope_parameters") is not None:
        found["text_config"] = dict(text)
        kind = str(text.get("model_type") or f"{found.get('model_type')}_text")
        notes += lift(found["text_config"], kind, f"{where}: text_config")
    notes = list(dict.fromkeys(notes))
    return found, notes


def lift(config: dict[str, Any], model_type: str, where: object) -> list[str]:
    """The same for one flat configuration, in place."""
    nested = config.get("rope_parameters")
    if nested is None or model_type in _READ_AS_THEY_ARE:
        return []
    if not isinstance(nested, dict):
        raise UnsupportedError(f"{where}: rope_parameters is {_shown(nested)}: an object expected")
    del config["rope_parameters"]
    if any(isinstance(value, dict) for value in nested.values()):
        nested = _one_set(config, nested, model_type, where)
    scaling = dict(nested)
    names = _NAMES.get(model_type, {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            _put(config, names.get(name, name), scaling.pop(name), where)
    notes = [NOTE]
    if nested.get("partial_rotary_factor", 1) != 1 and model_type not in _PARTIAL:
        notes.append(
            f"partial_rotary_factor {nested['partial_rotary_factor']} is not read by mlx-lm's {model_type}: its text "
            "differs from that of transformers"
        )
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        config.setdefault("rope_scaling", None)
        return notes
    if rope_type not in _SCALINGS.get(model_type, ()):
        legal = ", ".join(("default", *_SCALINGS.get(model_type, ())))
        raise UnsupportedError(
            f"{where}: rope type {_shown(rope_type)} in rope_parameters is not supported for {model_type}; supported "
            f"types: {legal}"
        )
    older = config.get("rope_scaling")
    if older is not None and older not in (nested, scaling):
        raise InvalidInputError(f"{where}: rope_scaling and rope_parameters differ; remove the wrong one")
    scaling["type"] = scaling["rope_type"] = rope_type
    config["rope_scaling"] = scaling
    original = scaling.get("original_max_position_embeddings")
    if model_type == "phi3" and original is not None:
        config.setdefault("original_max_position_embeddings", original)
    return notes


def _one_set(config: dict[str, Any], nested: dict[str, Any], model_type: str, where: object) -> dict[str, Any]:
    """The set of the layers that see everything; what the sliding ones say beside it goes where mlx-lm reads it."""
    refusal = UnsupportedError(f"{where}: rope_parameters is {_shown(nested)}: one set for all layers expected")
    if model_type not in ("gemma3_text", "olmo3") or set(nested) - _PER_LAYER or "full_attention" not in nested:
        raise refusal
    full, sliding = nested["full_attention"], nested.get("sliding_attention") or {}
    if not isinstance(full, dict) or not isinstance(sliding, dict):
        raise refusal
    base = sliding.get("rope_theta")
    if sliding.get("rope_type", "default") != "default":
        raise refusal
    if model_type == "gemma3_text" and base is not None:
        _put(config, "rope_local_base_freq", base, where)
    elif base is not None and base != full.get("rope_theta"):
        raise refusal
    return full


def _put(config: dict[str, Any], name: str, value: Any, where: object) -> None:
    if config.get(name) is not None and config[name] != value:
        raise InvalidInputError(
            f"{where}: {name} is {config[name]!r}, but {value!r} in rope_parameters; remove the wrong one"
        )
    config[name] = value


def _shown(value: Any) -> str:
    return ascii(value)[:120]
