"""``config.json`` of a base model, checked and brought to the form that mlx-lm reads.

mlx-lm takes ``rope_theta`` and ``rope_scaling`` from the top level and falls back to a class default without a word,
so the nested form of transformers 5 is lifted, and a form that is not known is refused. So is every setting that the
MLX model does not read and would silently compute otherwise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.families import CONVERTED, FAMILIES
from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.families.rope_parameters import lift
from specstream_mlx.formats.messages import escaped, listing, refuse

SWITCHES = (
    "tie_word_embeddings", "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias",
    "layer_norm_elementwise_affine",
)  # fmt: skip
MAX_LAYERS = 1000  # building the modules of more takes seconds and hundreds of megabytes
# rope_parameters -> rope_scaling; anything else in rope_parameters is unknown and refused.
ROPE_FIELDS = frozenset(
    (
        "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
        "long_factor", "short_mscale", "long_mscale",
    )
)  # fmt: skip


def mlx_config(raw: dict[str, Any], where: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """``config.json`` in the form mlx-lm reads, with notes and warnings on what was changed."""
    config = dict(raw)
    notes: list[str] = []
    warnings: list[str] = []
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedError(f"{where}: model_type is {escaped(repr(model_type))}; this is not a model's config.json")
    if model_type not in CONVERTED:
        if model_type in FAMILIES:
            raise UnsupportedError(
                f"{where}: model_type {model_type!r} runs, but fine-tunes of it are not converted; make its streams "
                f"with `specstream-mlx train`, or convert one of {', '.join(CONVERTED)}"
            )
        raise UnsupportedError(
            f"{where}: model_type {escaped(repr(model_type))} is not supported; supported: {', '.join(CONVERTED)}"
        )
    if config.get("model_file") is not None:
        raise UnsupportedError(
            f"{where}: model_file names code to be run from the checkpoint; it is never run, remove it"
        )
    family, theirs = FAMILIES[model_type], CONVERTED[model_type]
    _check_numbers(config, theirs, where)
    _check_quantization(config, where)
    if config.pop("auto_map", None) is not None:
        notes.append("config.json: auto_map dropped; mlx-lm's own model is used, no code of the checkpoint is run")
    _check_fixed(config, theirs.fixed, where)
    if not family.ROTARY:
        if "tie_word_embeddings" not in config:
            config["tie_word_embeddings"] = True
            notes.append("config.json: no tie_word_embeddings, set to true as transformers does for this family")
        return config, [*notes, *theirs.complete(config, where)], warnings
    _check_rope(config, theirs, where, notes)
    notes += theirs.complete(config, where)
    window, layer_types = config.get("sliding_window"), config.get("layer_types")
    if isinstance(window, int) and (theirs.window == "ignored" or (theirs.window == "by layer" and not layer_types)):
        warnings.append(
            f"mlx-lm runs {model_type} without its sliding window of {window} tokens: "
            "longer prompts differ from PyTorch"
        )
    if theirs.window == "by layer" and isinstance(layer_types, list) and "sliding_attention" in layer_types:
        warnings.append(
            f"mlx-lm gives layers of {model_type} a sliding window of {window} tokens, as layer_types says: "
            "longer prompts differ from PyTorch, which has none or one for all"
        )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        warnings.append(
            "mlx-lm uses the long factors of longrope at every length: prompts within the original context "
            "differ from PyTorch"
        )
    return config, notes, warnings


def _check_numbers(config: dict[str, Any], theirs: HuggingFace, where: Path) -> None:
    problems = []
    sizes = theirs.sizes
    absent = [f"{where}: {name} is None, expected an integer >= 1" for name in sizes if config.get(name) is None]
    if absent:  # the file of something else than a decoder, or of one whose parts have other names
        raise UnsupportedError(listing(absent))
    for name in sizes:
        value = config.get(name)
        if type(value) is not int or not 1 <= value < 2**31:
            problems.append(f"{where}: {name} is {escaped(repr(value))}, expected an integer >= 1")
    for name in ("num_hidden_layers", "n_layer"):
        layers = config.get(name)
        if name in sizes and type(layers) is int and layers > MAX_LAYERS:
            problems.append(f"{where}: {name} is {layers}, which no model has")
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "word_embed_proj_dim", "n_ctx"):
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            problems.append(f"{where}: {name} is {escaped(repr(value))}, expected an integer >= 1")
    for name in theirs.epsilons:
        epsilon = config.get(name)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            problems.append(f"{where}: {name} is {escaped(repr(epsilon))}, expected a small number")
    for name in SWITCHES:
        value = config.get(name, False)
        if not isinstance(value, bool):
            problems.append(f"{where}: {name} is {escaped(repr(value))}, expected true or false")
    refuse(problems)


def _check_fixed(config: dict[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: Path) -> None:
    """Refuse a setting that the MLX model does not read; the first of the values it has is transformers' default."""
    problems = []
    for name, values in fixed.items():
        value = config.get(name, values[0])
        if not any(value is known or value == known for known in values):
            problems.append(f"{where}: {name} is {escaped(repr(value))}; the MLX model computes {values[0]!r} here")
    refuse(problems, UnsupportedError)


def _check_quantization(config: dict[str, Any], where: Path) -> None:
    if "quantization" in config:
        how = config["quantization"]
        if not isinstance(how, dict) or not all(type(how.get(name)) is int for name in ("bits", "group_size")):
            raise InvalidInputError(f"{where}: quantization needs integers bits and group_size; restore the file")
        return
    foreign = config.get("quantization_config")
    if foreign is not None:
        method = foreign.get("quant_method", "unnamed") if isinstance(foreign, dict) else foreign
        raise UnsupportedError(
            f"{where}: the base is quantised ({escaped(str(method))}); give the full-precision base with --hf-path"
        )


def _check_rope(config: dict[str, Any], theirs: HuggingFace, where: Path, notes: list[str]) -> None:
    """Refuse a position encoding that mlx-lm does not compute as transformers does."""
    notes += [f"config.json: {note}" for note in lift(config, str(config["model_type"]), where)]
    theta = config.get("rope_theta")
    if theta is None:
        if theirs.rope_theta is None:
            raise InvalidInputError(f"{where}: rope_theta is missing, and its defaults differ; add it to config.json")
        config["rope_theta"] = theirs.rope_theta
        notes.append(f"config.json: no rope_theta, set to {theirs.rope_theta:g} as transformers does")
    elif isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e15:
        raise InvalidInputError(f"{where}: rope_theta is {escaped(repr(theta))}, expected a positive number")
    given = config.get("rope_scaling")
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidInputError(f"{where}: rope_scaling is {escaped(repr(given))}, expected an object")
    scaling = dict(given)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    unknown = sorted(set(scaling) - ROPE_FIELDS)
    if rope_type not in theirs.rope_types or unknown:
        detail = f"unknown field {escaped(unknown[0])}" if unknown else f"rope type {escaped(repr(rope_type))}"
        raise UnsupportedError(
            f"{where}: {detail} in the position encoding is not supported for {config['model_type']}; "
            f"supported types: {', '.join(theirs.rope_types)}"
        )
    original = scaling.get("original_max_position_embeddings")
    if "longrope" in theirs.rope_types and original is not None:
        config.setdefault("original_max_position_embeddings", original)
    scaling["type"] = scaling["rope_type"] = rope_type
    config["rope_scaling"] = None if rope_type == "default" else scaling
