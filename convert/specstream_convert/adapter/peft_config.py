"""``adapter_config.json`` of PEFT: the scale of every module, the modules it must cover, and what is refused.

The LoRA of a module adds ``scale * B @ A`` to its weight, with ``scale = alpha / r`` or ``alpha / sqrt(r)``. Fields
that make it something else, or change the base under it in a way that the files do not tell, are refused by name.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specstream_convert.changes.initial import RECOMPUTABLE, reason_against
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import escaped, refuse

ADAPTER_CONFIG = "adapter_config.json"
MERGE_IN_PEFT = (
    "merge it in PEFT (merge_and_unload, then save_pretrained) and give that directory as --hf-path, "
    "with the streams as --streams-path"
)
# Fields that do not change what the saved LoRA computes at inference.
INERT = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
        "revision", "runtime_config", "task_type", "loftq_config", "inject_adapter_in_model", "velora_config",
    )
)  # fmt: skip
READ = frozenset(
    (
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
        "layers_to_transform", "modules_to_save", "init_lora_weights", "bias", "use_dora", "lora_bias",
        "trainable_token_indices", "ensure_weight_tying",
    )
)  # fmt: skip
# Field, what it does, for values other than the default (None, False, empty).
REFUSED = {
    "use_qalora": "the input is pooled in groups before A",
    "use_bdlora": "A or B is block diagonal",
    "target_parameters": "LoRA on bare parameters (fused experts) is packed in two incompatible ways",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "the layers are Megatron's parallel ones",
    "alora_invocation_tokens": "the adapter acts only after given tokens",
    "arrow_config": "adapters are routed per token",
    "monteclora_config": "the adapter is sampled",
    "kasa_config": "the base weights were changed at initialisation",
    "lora_ga_config": "the base weights were changed at initialisation",
}
NOT_MERGED_IN_PEFT = {  # what PEFT cannot merge either, and what can be done
    "alora_invocation_tokens": "retrain without it",
    "arrow_config": "convert one of its adapters",
}
PROMPT_LEARNING = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
INITS_OF_AN_UNCHANGED_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
BIASES = ("none", "all", "lora_only")
_SIMPLE = re.compile(r"^[\w.\-]+$")


@dataclass(frozen=True)
class PeftConfig:
    """The part of ``adapter_config.json`` that decides the numbers."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"  # which biases of the base were trained: none, all or lora_only
    modules_to_save: tuple[str, ...] = ()  # streams apart
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False
    base_model: str | None = None
    revision: str | None = None
    saves_streams: bool = False
    notes: tuple[str, ...] = ()
    initial: str | None = None  # an initialisation that changed the base and can be recomputed

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives ``module``."""
        return matched(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of ``B @ A`` for ``module``.

        >>> PeftConfig(Path("x"), rank=16, alpha=32, use_rslora=True).scale_of("model.layers.0.mlp.up_proj")
        8.0
        """
        rank, alpha = self.rank_of(module), matched(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether ``modules_to_save`` names ``module`` or a module around it.

        >>> config = PeftConfig(Path("x"), rank=16, alpha=32, use_rslora=False, modules_to_save=("mlp",))
        >>> config.saves("model.layers.0.mlp.up_proj"), config.saves("model.norm")
        (True, False)
        """
        parts = module.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(path.endswith(name) for path in paths for name in self.modules_to_save)

    def token_rows(self, module: str) -> tuple[int, ...] | None:
        """The rows that ``trainable_token_indices`` names of ``module``; a bare list is the input embedding's."""
        indices = self.trainable_token_indices
        if isinstance(indices, dict):
            return next((rows for name, rows in indices.items() if module.endswith(name)), None)
        return indices

    def expected_modules(self, modules: Iterable[str]) -> set[str] | None:
        """The layers of the base that PEFT must have wrapped; None when only a regex says which."""
        if self.target_modules is None or isinstance(self.target_modules, str):
            return None
        if isinstance(self.exclude_modules, str):
            return None
        targets, excluded = self.target_modules, self.exclude_modules or ()
        chosen = {name for name in modules if _named(name, targets) and not _named(name, excluded)}
        chosen = {name for name in chosen if not self.saves(name)}
        if self.layers_to_transform is not None:
            chosen = {name for name in chosen if layer_of(name) in self.layers_to_transform}
        return chosen


def layer_of(module: str) -> int | None:
    """The decoder layer a module belongs to.

    >>> layer_of("model.layers.11.mlp.up_proj"), layer_of("lm_head")
    (11, None)
    """
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d{1,6})\.", module)
    return int(match.group(1)) if match else None


def matched(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of ``pattern`` that is the end of ``module``, in PEFT's order and by its rule."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _named(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def read_peft_config(path: Path) -> PeftConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        InvalidInputError: damaged, incomplete, or of another tool.
        UnsupportedError: a PEFT feature with no exact result here; every offending field is listed.
    """
    if not path.exists():
        raise InvalidInputError(
            f"{path}: file not found; the scale of a LoRA is only written there, copy it from the training run"
        )
    raw = read_json(path)
    if "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw):
        raise InvalidInputError(f"{path}: this adapter is already in mlx-lm's format; there is nothing to convert")
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise InvalidInputError(f"{path}: peft_type is {kind!r}; this is not a PEFT adapter configuration")
    if kind in PROMPT_LEARNING:
        raise UnsupportedError(
            f"{path}: peft_type {kind} is not supported, only LORA: it trains inputs, not weights, so there is "
            "nothing to merge; retrain with LoRA"
        )
    if kind != "LORA":
        raise UnsupportedError(
            f"{path}: peft_type {escaped(kind)} is not supported, only LORA; {MERGE_IN_PEFT} "
            "(or approximate it with peft.convert_to_lora)"
        )
    _refuse_unsupported(path, raw)
    return _read_numbers(path, raw)


def _refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    problems = []
    for name, reason in REFUSED.items():
        if raw.get(name):
            way_out = NOT_MERGED_IN_PEFT.get(name, MERGE_IN_PEFT)
            problems.append(f"{path}: {name} is {_short(raw[name])}: {reason}; {way_out}")
    init = raw.get("init_lora_weights")
    if init not in INITS_OF_AN_UNCHANGED_BASE and _recomputable(init) is None:
        problems.append(f"{path}: init_lora_weights is {_short(init)}: {reason_against(init)}")
    if raw.get("use_dora") and raw.get("lora_bias"):
        problems.append(f"{path}: use_dora with lora_bias: PEFT itself refuses this, its result is not defined")
    for name in sorted(set(raw) - INERT - READ - set(REFUSED)):
        if raw[name]:
            problems.append(
                f"{path}: {escaped(name)} is {_short(raw[name])}: this field is not known here and may change the "
                f"result; {MERGE_IN_PEFT}"
            )
    refuse(problems, UnsupportedError)


def _recomputable(init: Any) -> str | None:
    """The initialisation's name; PEFT reads that of OLoRA in any case of letters."""
    name = init.lower() if isinstance(init, str) and init.lower() == "olora" else init
    return name if name in RECOMPUTABLE else None


def _is_stream_module(name: Any) -> bool:
    return isinstance(name, str) and name.split(".")[-1] == "specstream"


class _Fields:
    """Reads fields of the configuration and collects what is wrong with them."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.problems: list[str] = []
        self._path, self._raw = path, raw

    def wrong(self, name: str, value: Any, expected: str) -> None:
        self.problems.append(f"{self._path}: {name} is {_short(value)}, expected {expected}")

    def of(self, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
        """The field, or None where it is absent or wrong."""
        value = self._raw.get(name)
        if value is None or fits(value):
            return value
        self.wrong(name, value, expected)
        return None

    def number(self, value: Any, name: str, integer: bool) -> Any:
        kinds = int if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not _finite(value) or (integer and value < 1):
            self.wrong(name, value, "an integer >= 1" if integer else "a number")
            return 1
        return value if integer else float(value)

    def pattern(self, name: str, integer: bool) -> dict[str, Any]:
        """Numbers by regular expressions of module names."""
        value = self.of(name, lambda value: not value or isinstance(value, dict), "an object") or {}
        for key in value:
            problem = _regex_problem(key)
            if problem:
                self.problems.append(f"{self._path}: {name} has key {_short(key)}: {problem}")
        return {key: self.number(item, f"{name}[{_short(key)}]", integer) for key, item in value.items()}

    def names(self, name: str) -> tuple[str, ...] | str | None:
        value = self.of(name, _is_names, "a string or a list of strings")
        return tuple(value) if isinstance(value, list) else value

    def flag(self, name: str) -> bool:
        return bool(self.of(name, lambda value: not value or isinstance(value, bool), "true or false"))

    def text(self, name: str) -> str | None:
        value: str | None = self.of(name, lambda value: isinstance(value, str), "a string")
        return value

    def layers(self) -> tuple[int, ...] | None:
        """``layers_to_transform``, which may be one number."""
        value = self.of("layers_to_transform", _is_int_or_ints, "a list of integers")
        return None if value is None else (value,) if type(value) is int else tuple(value)

    def token_indices(self) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
        """``trainable_token_indices``: rows, or rows by module."""
        name = "trainable_token_indices"
        value = self._raw.get(name)
        if not value:
            return None
        lists = value if isinstance(value, dict) else {"": value}
        if not all(_is_ints(rows) and all(row >= 0 for row in rows) for rows in lists.values()):
            self.wrong(name, value, "token ids, or those of every module")
            return None
        twice = [module for module, rows in lists.items() if len(set(rows)) != len(rows)]
        self.problems += [f"{self._path}: {name} names a token of {_short(key)} twice; remove one" for key in twice]
        return {module: tuple(rows) for module, rows in value.items()} if isinstance(value, dict) else tuple(value)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_int_or_ints(value: Any) -> bool:
    return type(value) is int or _is_ints(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _read_numbers(path: Path, raw: dict[str, Any]) -> PeftConfig:
    fields = _Fields(path, raw)
    saved = fields.names("modules_to_save") or ()
    saved = (saved,) if isinstance(saved, str) else saved
    alpha = fields.number(raw.get("lora_alpha"), "lora_alpha", False)
    bias = raw.get("bias", "none")
    if bias not in BIASES:
        fields.wrong("bias", bias, "'none', 'all' or 'lora_only'")
    effect = "does nothing" if alpha == 0 else "acts inverted"
    config = PeftConfig(
        path=path,
        rank=fields.number(raw.get("r"), "r", True),
        alpha=alpha,
        use_rslora=fields.flag("use_rslora"),
        rank_pattern=fields.pattern("rank_pattern", True),
        alpha_pattern=fields.pattern("alpha_pattern", False),
        target_modules=fields.names("target_modules"),
        exclude_modules=fields.names("exclude_modules"),
        layers_to_transform=fields.layers(),
        use_dora=fields.flag("use_dora"),
        lora_bias=fields.flag("lora_bias"),
        bias=bias if isinstance(bias, str) else "none",
        modules_to_save=tuple(name for name in saved if name and not _is_stream_module(name)),
        trainable_token_indices=fields.token_indices(),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        base_model=fields.text("base_model_name_or_path"),
        revision=fields.text("revision"),
        saves_streams=any(_is_stream_module(name) for name in saved),
        notes=(f"lora_alpha is {alpha:g}: the adapter {effect}",) if alpha <= 0 else (),
        initial=_recomputable(raw.get("init_lora_weights")),
    )
    refuse(fields.problems)
    return config


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value) and abs(value) < 1e9
    except OverflowError:
        return False


def _regex_problem(key: str) -> str | None:
    """Why a pattern key is not evaluated: PEFT treats keys as regular expressions, and some never finish."""
    if _SIMPLE.match(key):
        return None
    if len(key) > 300 or re.search(r"\)\s*[*+{?]", key) or len(re.findall(r"[*+{?]", key)) > 4:
        return "too costly as a regular expression; write plain module names"
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression ({escaped(str(error))})"
    return None


def _short(value: Any) -> str:
    return escaped(repr(value))
