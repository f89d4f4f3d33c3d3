"""The contract file ``specstream_config.json`` as frozen dataclasses.

The file stands beside every Speculative Streaming checkpoint, in PyTorch form and in MLX form. It has no defaults
for what a trainer must know: a missing field is an error, because a wrong guess would not crash, it would only
draft badly.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.options import Mode, StreamPosition

CONFIG_NAME = "specstream_config.json"
WEIGHTS_NAME = "specstream.safetensors"
PREFIX = "specstream."  # of every stream tensor
LORA_PREFIX = "lora."  # of a lossless checkpoint's LoRA, beside the stream tensors
# What the ``base_model`` block records of a base beside its name and mark; the sizes must be those of the base at hand.
BASE_SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
BASE_FIELDS = (*BASE_SIZES, "tie_word_embeddings")
FORMAT = "specstream"
FORMAT_VERSION = 1
MAX_GAMMA = 32

REQUIRED = ("gamma", "num_stream_layers", "mode", "stream_id", "stream_init", "stream_position", "prune")
OPTIONAL = (
    "format",
    "format_version",
    "lora_rows",
    "main_attends_streams",
    "base_model",
    "training",
    "lora",
    "source",
)


@dataclass(frozen=True)
class StreamId:
    """How a stream knows its number: a learned row ``P_j`` or a rotation of its values by ``epsilon * j``."""

    type: Literal["embedding", "value_rotation"]
    epsilon: float | None = None


@dataclass(frozen=True)
class StreamInit:
    """``f_eta`` of ``S_{t,j} = f_eta(M_t) + P_j``: identity, or ``[x +] up(down(x))`` of rank ``rank``."""

    type: Literal["identity", "low_rank"]
    rank: int | None = None
    residual: bool = True


@dataclass(frozen=True)
class Prune:
    """The early-exit head ``z = LMHead([final_norm] o(M))`` read after layer ``layer``; ``o`` has rank ``rank``."""

    rank: int
    layer: int
    residual: bool = True
    final_norm: bool = True


@dataclass(frozen=True)
class StreamConfig:
    """A validated ``specstream_config.json``; ``base_model``, ``training``, ``lora`` and ``source`` stay as read."""

    gamma: int
    num_stream_layers: int
    mode: Mode
    stream_id: StreamId
    stream_init: StreamInit
    stream_position: StreamPosition
    prune: Prune | None
    base_model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # keys that start with x_

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = CONFIG_NAME) -> "StreamConfig":
        """Validate ``raw``; ``where`` names the file in messages.

        Raises:
            InvalidInputError: a field is missing, unknown, of the wrong type or out of range (all are listed).
            UnsupportedError: a newer format version, or a variant of the method that we do not run.
        """
        return _Reader(raw, where).read()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this configuration, in the order of the contract."""
        raw: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "gamma": self.gamma,
            "num_stream_layers": self.num_stream_layers,
            "mode": self.mode,
            "lora_rows": "all" if self.mode == "shared" else "streams",
            "stream_id": {"type": self.stream_id.type},
            "stream_init": {"type": self.stream_init.type},
            "stream_position": self.stream_position,
            "main_attends_streams": False,
            "prune": None,
            "base_model": self.base_model,
            "training": self.training,
        }
        if self.stream_id.epsilon is not None:
            raw["stream_id"]["epsilon"] = self.stream_id.epsilon
        if self.stream_init.type == "low_rank":
            raw["stream_init"] |= {"rank": self.stream_init.rank, "residual": self.stream_init.residual}
        if self.prune is not None:
            raw["prune"] = {
                "type": "low_rank",
                "rank": self.prune.rank,
                "layer": self.prune.layer,
                "residual": self.prune.residual,
                "final_norm": self.prune.final_norm,
            }
        if self.lora is not None:
            raw["lora"] = self.lora
        if self.source is not None:
            raw["source"] = self.source
        return raw | self.extra

    def tensor_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names (without the ``specstream.`` prefix) and shapes of the stream tensors this configuration needs."""
        d = hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.stream_id.type == "embedding":
            shapes["stream_embeddings"] = (self.gamma, d)
        if self.stream_init.type == "low_rank":
            assert self.stream_init.rank is not None
            shapes["stream_init.down.weight"] = (self.stream_init.rank, d)
            shapes["stream_init.up.weight"] = (d, self.stream_init.rank)
        if self.prune is not None:
            shapes["prune.down.weight"] = (self.prune.rank, d)
            shapes["prune.up.weight"] = (d, self.prune.rank)
        return shapes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object strictly: no duplicate keys, no NaN, UTF-8 only.

    Raises:
        InvalidInputError: the file is missing, unreadable, not a regular file, not JSON, or not an object.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InvalidInputError(f"{path}: key {key!r} appears twice; keep one")
            seen[key] = value
        return seen

    def no_constant(name: str) -> Any:
        raise InvalidInputError(f"{path}: {name} is not valid JSON; write a number or null")

    if not path.exists():
        raise InvalidInputError(f"{path}: file not found")
    if not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInputError(f"{path}: not valid JSON ({reason}); restore the file") from error
    if not isinstance(raw, dict):
        raise InvalidInputError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


class _Reader:
    """Reads one raw object, collecting every problem before raising once."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.problems: list[str] = []

    def read(self) -> StreamConfig:
        raw = self.raw
        self._check_format()
        missing = [key for key in REQUIRED if key not in raw]
        if missing:
            self.problems.append(f"missing {', '.join(missing)} (there are no defaults)")
        unknown = [key for key in raw if key not in REQUIRED + OPTIONAL and not key.startswith("x_")]
        if unknown:
            self.problems.append(f"unknown {', '.join(map(repr, unknown))} (own keys start with 'x_')")
        gamma = self._integer(raw, "gamma", 1, MAX_GAMMA)
        num_stream_layers = self._integer(raw, "num_stream_layers", 1, None)
        mode: Mode = self._choice(raw, "mode", get_args(Mode))
        position: StreamPosition = self._choice(raw, "stream_position", get_args(StreamPosition))
        stream_id = self._stream_id()
        stream_init = self._stream_init()
        prune = self._prune()
        self._check_lora_rows(mode)
        base_model = self._object("base_model") or {}
        layers = base_model.get("num_hidden_layers")
        if isinstance(layers, int) and num_stream_layers > layers:
            self.problems.append(f"num_stream_layers is {num_stream_layers}, the base has {layers} layers")
        if isinstance(layers, int) and prune is not None and prune.layer > layers:
            self.problems.append(f"prune.layer is {prune.layer}, the base has {layers} layers")
        training = self._object("training") or {}
        lora, source = self._object("lora"), self._object("source")
        if self.problems:
            raise InvalidInputError("\n".join(f"{self.where}: {problem}" for problem in self.problems))
        return StreamConfig(
            gamma=gamma,
            num_stream_layers=num_stream_layers,
            mode=mode,
            stream_id=stream_id,
            stream_init=stream_init,
            stream_position=position,
            prune=prune,
            base_model=base_model,
            training=training,
            lora=lora,
            source=source,
            extra={key: value for key, value in raw.items() if key.startswith("x_")},
        )

    def _check_format(self) -> None:
        name, version = self.raw.get("format", FORMAT), self.raw.get("format_version", FORMAT_VERSION)
        if name != FORMAT:
            self.problems.append(f"format is {name!r}, expected {FORMAT!r}")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            self.problems.append(f"format_version is {version!r}, expected {FORMAT_VERSION}")
        elif version > FORMAT_VERSION:
            raise UnsupportedError(
                f"{self.where}: format_version {version} is newer than {FORMAT_VERSION}; upgrade specstream-mlx"
            )
        attends = self.raw.get("main_attends_streams", False)
        if not isinstance(attends, bool):
            self.problems.append(f"main_attends_streams is {attends!r}, expected true or false")
        elif attends:
            raise UnsupportedError(
                f"{self.where}: main_attends_streams is true; this variant changes the main stream and is not "
                "supported, train with main_attends_streams false"
            )

    def _check_lora_rows(self, mode: str) -> None:
        expected = "streams" if mode == "lossless" else "all"
        rows = self.raw.get("lora_rows", expected)
        if rows != expected and mode in ("shared", "lossless"):
            self.problems.append(f"lora_rows is {rows!r}, mode {mode!r} goes with {expected!r}")

    def _stream_id(self) -> StreamId:
        raw = self._object("stream_id")
        if raw is None:
            return StreamId("embedding")
        kind = self._choice(raw, "type", ("embedding", "value_rotation"), "stream_id.")
        self._only(raw, "stream_id", ("type", "epsilon") if kind == "value_rotation" else ("type",))
        if kind != "value_rotation":
            return StreamId("embedding")
        epsilon = raw.get("epsilon")
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not math.isfinite(epsilon):
            self.problems.append(f"stream_id.epsilon is {epsilon!r}, value_rotation needs a finite number")
            epsilon = 0.0
        return StreamId("value_rotation", float(epsilon))

    def _stream_init(self) -> StreamInit:
        raw = self._object("stream_init")
        if raw is None:
            return StreamInit("identity")
        kind = self._choice(raw, "type", ("identity", "low_rank"), "stream_init.")
        self._only(raw, "stream_init", ("type", "rank", "residual") if kind == "low_rank" else ("type",))
        if kind != "low_rank":
            return StreamInit("identity")
        rank = self._integer(raw, "rank", 1, None, "stream_init.")
        return StreamInit("low_rank", rank, self._boolean(raw, "residual", True, "stream_init."))

    def _prune(self) -> Prune | None:
        raw = self._object("prune")
        if raw is None:
            return None
        self._only(raw, "prune", ("type", "rank", "layer", "residual", "final_norm"))
        self._choice(raw, "type", ("low_rank",), "prune.")
        return Prune(
            rank=self._integer(raw, "rank", 1, None, "prune."),
            layer=self._integer(raw, "layer", 1, None, "prune."),
            residual=self._boolean(raw, "residual", True, "prune."),
            final_norm=self._boolean(raw, "final_norm", True, "prune."),
        )

    def _only(self, raw: Mapping[str, Any], name: str, known: tuple[str, ...]) -> None:
        unknown = [key for key in raw if key not in known]
        if unknown:
            self.problems.append(f"{name} has unknown {', '.join(map(repr, unknown))}; known: {', '.join(known)}")

    def _object(self, key: str) -> dict[str, Any] | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{key} is {value!r}, expected an object")
            return None
        if value is None and key in ("stream_id", "stream_init") and key in self.raw:
            self.problems.append(f"{key} is null, expected an object")
        return value

    def _integer(self, raw: Mapping[str, Any], key: str, low: int, high: int | None, prefix: str = "") -> int:
        value = raw.get(key)
        if key not in raw and prefix == "":
            return low  # reported as missing
        limits = f"{low}..{high}" if high is not None else f"of at least {low}"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
            self.problems.append(f"{prefix}{key} is {value!r}, expected an integer {limits}")
            return low
        return value

    def _boolean(self, raw: Mapping[str, Any], key: str, default: bool, prefix: str) -> bool:
        value = raw.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{prefix}{key} is {value!r}, expected true or false")
            return default
        return value

    def _choice(self, raw: Mapping[str, Any], key: str, legal: tuple[str, ...], prefix: str = "") -> Any:
        if key not in raw and prefix == "":
            return legal[0]  # reported as missing
        value = raw.get(key)
        if value not in legal:
            self.problems.append(f"{prefix}{key} is {value!r}, expected {' or '.join(map(repr, legal))}")
            return legal[0]
        return value
