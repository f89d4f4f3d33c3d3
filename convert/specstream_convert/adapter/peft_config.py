"""``adapter_config.json`` of PEFT: the scale of every module, the modules it must cover, and what is refused.

The LoRA of a module adds ``scale * B @ A`` to its weight, with ``scale = alpha / r`` or ``alpha / sqrt(r)``. Fields
that make it something else, or change the base under it in a way that the files do not tell, are refused by name.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specstream_convert.changes.initial import RECOMPUTABLE, reason_against
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import escaped, listing

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
    if problems:
        raise UnsupportedError(listing(problems))


def _recomputable(init: Any) -> str | None:
    """The initialisation's name; PEFT reads that of OLoRA in any case of letters."""
    name = init.lower() if isinstance(init, str) and init.lower() == "olora" else init
    return name if name in RECOMPUTABLE else None


def _is_stream_module(name: Any) -> bool:
    return isinstance(name, str) and name.split(".")[-1] == "specstream"


def _read_numbers(path: Path, raw: dict[str, Any]) -> PeftConfig:
    problems: list[str] = []

    def number(value: Any, name: str, integer: bool) -> Any:
        kinds = int if integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not _finite(value) or (integer and value < 1):
            problems.append(
                f"{path}: {name} is {_short(value)}, expected {'an integer >= 1' if integer else 'a number'}"
            )
            return 1
        return value if integer else float(value)

    def pattern(name: str, integer: bool) -> dict[str, Any]:
        value = raw.get(name) or {}
        if not isinstance(value, dict):
            problems.append(f"{path}: {name} is {_short(value)}, expected an object")
            return {}
        for key in value:
            problem = _regex_problem(key)
            if problem:
                problems.append(f"{path}: {name} has key {_short(key)}: {problem}")
        return {key: number(item, f"{name}[{_short(key)}]", integer) for key, item in value.items()}

    def names(name: str) -> tuple[str, ...] | str | None:
        value = raw.get(name)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            problems.append(f"{path}: {name} is {_short(value)}, expected a string or a list of strings")
            return None
        return tuple(value)

    def flag(name: str) -> bool:
        value = raw.get(name) or False
        if not isinstance(value, bool):
            problems.append(f"{path}: {name} is {_short(value)}, expected true or false")
        return bool(value)

    def text(name: str) -> str | None:
        value = raw.get(name)
        if value is not None and not isinstance(value, str):
            problems.append(f"{path}: {name} is {_short(value)}, expected a string")
            return None
        return value

    def token_indices() -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
        value = raw.get("trainable_token_indices")
        if not value:
            return None
        lists = value if isinstance(value, dict) else {"": value}
        for name, rows in lists.items():
            if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
                problems.append(
                    f"{path}: trainable_token_indices is {_short(value)}, expected token ids, or those of every module"
                )
                return None
            if len(set(rows)) != len(rows):
                problems.append(f"{path}: trainable_token_indices names a token of {_short(name)} twice; remove one")
        if isinstance(value, dict):
            return {name: tuple(rows) for name, rows in value.items()}
        return tuple(value)

    layers = raw.get("layers_to_transform")
    if type(layers) is int:
        layers = [layers]
    if layers is not None and (not isinstance(layers, list) or not all(type(n) is int for n in layers)):
        problems.append(f"{path}: layers_to_transform is {_short(layers)}, expected a list of integers")
        layers = None
    saved = names("modules_to_save") or ()
    if isinstance(saved, str):
        saved = (saved,)
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"{path}: bias is {_short(bias)}, expected 'none', 'all' or 'lora_only'")
    notes = []
    alpha = number(raw.get("lora_alpha"), "lora_alpha", False)
    if alpha <= 0 and not problems:
        notes.append(f"lora_alpha is {alpha:g}: the adapter {'does nothing' if alpha == 0 else 'acts inverted'}")
    config = PeftConfig(
        path=path,
        rank=number(raw.get("r"), "r", True),
        alpha=alpha,
        use_rslora=flag("use_rslora"),
        rank_pattern=pattern("rank_pattern", True),
        alpha_pattern=pattern("alpha_pattern", False),
        target_modules=names("target_modules"),
        exclude_modules=names("exclude_modules"),
        layers_to_transform=None if layers is None else tuple(layers),
        use_dora=flag("use_dora"),
        lora_bias=flag("lora_bias"),
        bias=bias if isinstance(bias, str) else "none",
        modules_to_save=tuple(name for name in saved if name and not _is_stream_module(name)),
        trainable_token_indices=token_indices(),
        ensure_weight_tying=flag("ensure_weight_tying"),
        base_model=text("base_model_name_or_path"),
        revision=text("revision"),
        saves_streams=any(_is_stream_module(name) for name in saved),
        notes=tuple(notes),
        initial=_recomputable(raw.get("init_lora_weights")),
    )
    if problems:
        raise InvalidInputError(listing(problems))
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
