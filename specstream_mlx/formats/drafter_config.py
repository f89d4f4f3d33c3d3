"""``drafter_config.json``: what an adapter directory with a draft head says of it.

The head's tensors lie beside it in ``drafter.safetensors``, under the names of the head's own module. The file names
the kind of head and the base that it was trained for; the settings of a kind are read by the drafter of that kind.
Nothing here imports MLX.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specstream_mlx.errors import InvalidInputError, UnsupportedError

DRAFTER_CONFIG = "drafter_config.json"
DRAFTER_WEIGHTS = "drafter.safetensors"
FORMAT = "specstream-drafter"
FORMAT_VERSION = 1
REQUIRED = ("kind", "settings", "base_model")
OPTIONAL = ("format", "format_version", "training", "source")


@dataclass(frozen=True)
class DrafterConfig:
    """A validated ``drafter_config.json``.

    Attributes:
        kind: the drafter, as ``--drafter`` calls it.
        settings: of that kind; its drafter checks them.
        base_model: the sizes, name and mark of the base that the head reads, as in ``specstream_config.json``.
        training: how it was trained.
        source: what it was converted from.
    """

    kind: str
    settings: dict[str, Any]
    base_model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = DRAFTER_CONFIG) -> "DrafterConfig":
        """Validate ``raw``; ``where`` names the file in messages.

        Raises:
            InvalidInputError: a field is missing, unknown or of the wrong type (all are listed).
            UnsupportedError: a newer format version.
        """
        problems = [f"missing {name} (there are no defaults)" for name in REQUIRED if name not in raw]
        unknown = [name for name in raw if name not in REQUIRED + OPTIONAL and not name.startswith("x_")]
        if unknown:
            problems.append(f"unknown {', '.join(map(repr, unknown))} (own keys start with 'x_')")
        if raw.get("format", FORMAT) != FORMAT:
            problems.append(f"format is {raw['format']!r}, expected {FORMAT!r}")
        version = raw.get("format_version", FORMAT_VERSION)
        if type(version) is not int or version < 1:
            problems.append(f"format_version is {version!r}, expected {FORMAT_VERSION}")
        elif version > FORMAT_VERSION:
            raise UnsupportedError(
                f"{where}: format_version {version} is newer than {FORMAT_VERSION}; upgrade specstream-mlx"
            )
        if "kind" in raw and not isinstance(raw["kind"], str):
            problems.append(f"kind is {raw['kind']!r}, expected a word")
        for name in ("settings", "base_model", "training", "source"):
            if name in raw and not isinstance(raw[name], dict):
                problems.append(f"{name} is {raw[name]!r}, expected an object")
        if problems:
            raise InvalidInputError("\n".join(f"{where}: {problem}" for problem in problems))
        blocks = {name: dict(raw.get(name, {})) for name in ("settings", "base_model", "training", "source")}
        return cls(raw["kind"], **blocks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in reading order."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": self.kind, "settings": self.settings}
        more = {name: getattr(self, name) for name in ("training", "source") if getattr(self, name)}
        return head | {"base_model": self.base_model} | more


class Settings:
    """Reads the settings of a head, collecting every problem before ``check`` raises once."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        """``where`` names the file in messages."""
        self._raw, self._where = raw, where
        self._known: set[str] = set()
        self._problems: list[str] = []

    def integer(self, name: str, low: int = 1, default: int | None = None) -> int:
        """A whole number of at least ``low``; without a default it must be there."""
        value = self._get(name, default)
        if type(value) is not int or value < low:
            self._problems.append(f"{name} is {value!r}, expected a whole number of at least {low}")
            return low
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self._problems.append(f"{name} is {value!r}, expected a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self._problems.append(f"{name} is {value!r}, expected true or false")
            return default
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object, or None where it is missing or null."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self._problems.append(f"{name} is {value!r}, expected an object or null")
            return None
        return value

    def layers(self, name: str, num_layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """Rising or equal numbers of layers, as many as the default has."""
        value = self._get(name, None)
        if value is None:
            return default
        good = isinstance(value, list) and len(value) == len(default) and all(type(n) is int for n in value)
        if not good or not all(0 <= n <= num_layers for n in value):
            self._problems.append(f"{name} is {value!r}, expected {len(default)} numbers from 0 to {num_layers}")
            return default
        return tuple(value)

    def require(self, good: bool, problem: str) -> None:
        """Note a problem unless all is ``good``."""
        if not good:
            self._problems.append(problem)

    def check(self) -> None:
        """Raise what was found.

        Raises:
            InvalidInputError: every problem, one per line; unknown settings too.
        """
        unknown = [name for name in self._raw if name not in self._known]
        if unknown:
            self._problems.append(f"unknown {', '.join(map(repr, unknown))}")
        if self._problems:
            raise InvalidInputError("\n".join(f"{self._where}: settings: {problem}" for problem in self._problems))

    def _get(self, name: str, default: Any) -> Any:
        self._known.add(name)
        return self._raw.get(name, default)
