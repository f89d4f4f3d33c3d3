"""The machine and the software that a measurement holds for."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


def device() -> str:
    """``cpu`` or ``gpu``: where MLX runs by default."""
    return "gpu" if mx.default_device() == mx.gpu else "cpu"


def blas() -> str:
    """What multiplies matrices on MLX's CPU backend: Accelerate, a preloaded OpenBLAS, or what the wheel links."""
    if sys.platform == "darwin":
        return "accelerate"
    return "openblas" if "openblas" in os.environ.get("LD_PRELOAD", "") else "bundled"


@cache
def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            name = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            name = ""
        if name:
            return name
    return platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """For the record of a benchmark."""
    info = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "os": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "device": device(),
        "device_name": str(info.get("device_name", "")),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "cpus": os.cpu_count(),
        "blas": blas(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
    }


def memory_bytes() -> int:
    """Main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def versions() -> dict[str, str]:
    """Of everything that decides what is computed and how fast."""
    from specstream_mlx import __version__

    names = ("mlx", "mlx-lm", "transformers", "numpy")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "specstream-mlx": __version__,
    }
