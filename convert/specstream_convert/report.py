"""The account of a conversion: what was read, what became of every tensor, what was checked."""

from dataclasses import dataclass, field
from importlib import metadata
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

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "tensor": self.tensor, "fate": self.fate, "target": self.target}


@dataclass(frozen=True)
class ConversionReport:
    """``conversion_report.json``. It holds no times and no paths, so the same input gives the same bytes."""

    mode: str | None
    placement: str  # merged, live, sidecar or none: where the LoRA of the output lives
    base: dict[str, Any]
    lora: dict[str, Any] | None
    streams: dict[str, Any] | None
    tensors: tuple[TensorFate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]
    input_hashes: dict[str, str]
    output_files: dict[str, dict[str, Any]]
    verification: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    dtype: str | None = None
    dry_run: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None  # of published draft heads: the kind and its settings

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in reading order."""
        report: dict[str, Any] = {
            "tool": TOOL,
            "report_version": 1,
            "dry_run": self.dry_run,
            "versions": self.versions,
            "options": self.options,
            "mode": self.mode,
            "placement": self.placement,
            "base": self.base,
            "lora": self.lora,
            "streams": self.streams,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "verification": self.verification,
            "input_hashes": self.input_hashes,
            "output_files": self.output_files,
            "tensors": [fate.to_dict() for fate in self.tensors],
        }
        return report if self.head is None else report | {"head": self.head}


def versions() -> dict[str, str]:
    """Of what decides the bytes of an output."""
    found = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "safetensors")}
    try:
        return found | {"specstream-mlx": metadata.version("specstream-mlx")}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return found
