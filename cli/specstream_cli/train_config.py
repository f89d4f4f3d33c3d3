"""``train --config``: a YAML file in the manner of ``mlx_lm lora``; what the command line gives comes first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specstream_mlx.errors import InvalidInputError, UsageError

FEATURES = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
_ONLY_IN_FILE: dict[str, type] = {
    "lr_schedule": dict,
    "optimizer_config": dict,
    "lora_parameters": dict,
    "hf_dataset": object,
    **dict.fromkeys(FEATURES, str),
}
_LORA = {"rank": int, "scale": float, "dropout": float, "keys": list}
_DATA_SET = {"path": str, "config": dict, "train_split": str, "valid_split": str, "test_split": str} | dict.fromkeys(
    FEATURES, str
)
# Keys of mlx-lm with one value that means anything here, and why.
_FIXED: dict[str, tuple[Any, str]] = {
    "train": (True, "this command only trains"),
    "fine_tune_type": ("lora", "streams are trained with LoRA"),
    "test": (False, "nothing is tested after a training; give the rows as valid.jsonl, or use `benchmark`"),
    "config": (None, "a file names no other file"),
}
# Keys of mlx-lm that change nothing here, and why.
_IGNORED = {
    "test_batches": "nothing is tested after a training",
    "clear_cache_threshold": "the cache of freed buffers is bounded anyway",
    "report_to": "every figure is in the adapter's training_log.jsonl",
    "project_name": "no service is reported to",
}


def read_config(path: Path, types: Mapping[str, type]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file, checked against the type that each option has, and what to say about them.

    Every key of an ``mlx_lm lora`` file is taken with mlx-lm's meaning, refused, or ignored with a note. An empty
    value is mlx-lm's way to leave a key out. ``lora_parameters`` becomes ``rank``, ``scale`` and ``lora_keys``;
    ``hf_dataset`` becomes a list.

    Raises:
        InvalidInputError: the file cannot be read, is no YAML mapping, or holds unknown keys or wrong values.
    """
    import yaml  # type: ignore[import-untyped]
    from mlx_lm.lora import yaml_loader

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), yaml_loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, or brackets without end
        raise InvalidInputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InvalidInputError(f"{path}: expected 'key: value' lines, found {type(raw).__name__}")
    given = {key: value for key, value in raw.items() if value is not None}
    problems = [
        f"{key}: got {given[key]!r}, only {str(only).lower()} is supported: {why}"
        for key, (only, why) in _FIXED.items()
        if key in given and given[key] != only
    ]
    notes = [f"{path}: {key} has no effect here: {why}" for key, why in _IGNORED.items() if given.get(key)]
    values = _checked(
        {key: value for key, value in given.items() if key not in (*_FIXED, *_IGNORED)},
        {**types, **_ONLY_IN_FILE},
        problems,
    )
    lora = _checked(values.pop("lora_parameters", {}), _LORA, problems, "lora_parameters.")
    if lora.pop("dropout", 0):
        problems.append("lora_parameters.dropout: not supported; set it to 0")
    if "keys" in lora:
        values["lora_keys"] = lora.pop("keys")
    values = lora | values
    if "hf_dataset" in values:
        values["hf_dataset"] = _data_sets(values["hf_dataset"], problems)
    if problems:
        raise InvalidInputError("\n".join(f"{path}: {problem}" for problem in problems))
    return values, notes


def refuse_flags(words: Sequence[str]) -> None:
    """Say of flags that ``mlx_lm lora`` has and this command has not why that is.

    Raises:
        UsageError: there is one.
    """
    reasons = {key: why for key, (_, why) in _FIXED.items() if key != "config"} | _IGNORED
    for word in words:
        why = (
            reasons.get(word.partition("=")[0].removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        )
        if why is not None:
            raise UsageError(f"{word}: an option of mlx_lm lora alone: {why}; drop it")


def _data_sets(raw: Any, problems: list[str]) -> list[dict[str, Any]]:
    """The data sets of ``hf_dataset``, one or a list of them."""
    found = []
    for block in raw if isinstance(raw, list) else [raw]:
        if not isinstance(block, dict) or not block.get("path"):
            problems.append(f"hf_dataset: got {block!r}, expected 'path: org/name' and further keys")
            continue
        found.append(_checked(block, _DATA_SET, problems, "hf_dataset."))
    return found


def _checked(
    raw: Mapping[str, Any], known: Mapping[str, type], problems: list[str], prefix: str = ""
) -> dict[str, Any]:
    """Those of the values that are known and of the right type; the others are problems."""
    values = {}
    for key, value in raw.items():
        if key not in known:
            problems.append(f"{prefix}{key}: unknown; known: {', '.join(sorted(known))}")
        elif value is not None and not _is(value, known[key]):
            problems.append(f"{prefix}{key}: got {value!r}, expected {known[key].__name__}")
        elif value is not None:
            values[key] = float(value) if known[key] is float else value
    return values


def _is(value: Any, kind: type) -> bool:
    if kind is float and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
