"""``train --config``: a YAML file in the manner of ``mlx_lm lora``; what the command line gives comes first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specstream_cli.validation import invalid_input

_ONLY_IN_FILE = {"lr_schedule": dict, "optimizer_config": dict, "lora_parameters": dict}
_LORA = {"rank": int, "scale": float, "dropout": float}


def read_config(path: Path, types: Mapping[str, type]) -> dict[str, Any]:
    """The settings of a file, checked against the type that each option has.

    ``lora_parameters`` gives rank and scale; ``train: true`` and ``fine_tune_type: lora`` of mlx-lm's files say
    nothing new and are allowed.

    Raises:
        InvalidInputError: the file cannot be read, is no YAML mapping, or holds unknown keys or wrong values.
    """
    import yaml  # type: ignore[import-untyped]
    from mlx_lm.lora import yaml_loader

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), yaml_loader)
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_input(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise invalid_input(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise invalid_input(f"{path}: expected 'key: value' lines, found {type(raw).__name__}")
    known = dict(types) | _ONLY_IN_FILE
    problems = []
    for key, only in (("train", True), ("fine_tune_type", "lora")):
        if raw.pop(key, only) != only:
            problems.append(f"{key}: only {str(only).lower()} is supported")
    values = {}
    for key, value in raw.items():
        if key not in known:
            problems.append(f"{key}: unknown; known: {', '.join(sorted(known))}")
        elif value is None:
            continue
        elif not _is(value, known[key]):
            problems.append(f"{key}: got {value!r}, expected {known[key].__name__}")
        else:
            values[key] = value
    lora = values.pop("lora_parameters", {})
    for key, value in lora.items():
        if key not in _LORA:
            problems.append(f"lora_parameters.{key}: unknown; known: {', '.join(_LORA)}")
        elif not _is(value, _LORA[key]):
            problems.append(f"lora_parameters.{key}: got {value!r}, expected {_LORA[key].__name__}")
        elif key != "dropout":
            values.setdefault(key, value)
        elif value:
            problems.append("lora_parameters.dropout: not supported; set it to 0")
    if problems:
        raise invalid_input("\n".join(f"{path}: {problem}" for problem in problems))
    return values


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
