"""The account of a conversion: what was read, what became of every tensor, what was checked."""

from dataclasses import asdict, dataclass
from typing import Any

TOOL = "specstream-convert"
REPORT_NAME = "conversion_report.json"


@dataclass(frozen=True)
class TensorFate:
    """What became of one input tensor; ``target`` is ``file:tensor`` of the output, or None when it was dropped."""

    file: str
    tensor: str
    fate: str
    target: str | None = None


@dataclass(frozen=True)
class ConversionReport:
    """``conversion_report.json``. It holds no times and no paths, so the same input gives the same bytes."""

    dry_run: bool
    versions: dict[str, str]
    options: dict[str, Any]
    mode: str | None
    placement: str  # merged, live, sidecar or none: where the LoRA of the output lives
    base: dict[str, Any]
    lora: dict[str, Any] | None
    streams: dict[str, Any] | None
    dtype: str | None
    quantization: dict[str, Any] | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    verification: dict[str, Any] | None
    input_hashes: dict[str, str]
    output_files: dict[str, dict[str, Any]]
    tensors: tuple[TensorFate, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in reading order."""
        return {"tool": TOOL, "report_version": 1} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }
