"""What surrounds a measurement: chip, memory, system, power and load, and what is to be said about each.

``survey`` asks the system; the findings are pure functions of its answers, so that those of a Mac are tested anywhere.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any, Literal

import mlx.core as mx
from packaging.requirements import Requirement

from specstream_mlx.target import machine

Verdict = Literal["ok", "note", "problem"]
VERDICTS: tuple[Verdict, ...] = ("ok", "note", "problem")
"""From best to worst. ``problem``: a check does not hold or could not be made."""

LEAST_MEMORY_GB = 8.0
MOST_LOAD = 0.5  # runnable programs per core while nothing of ours runs
NEURAL_ACCELERATORS = (5, (26, 2))  # the first chip generation with them, and the first macOS on which MLX uses them
FULL_SPEED = 0.9  # of the wired limit: beyond that mlx-lm warns


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        text: what was found.
        advice: what to do about it; None where nothing is to be done.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str | None = None


Ask = Callable[[Sequence[str]], str]


def ask_system(command: Sequence[str]) -> str:
    """Standard output of a program of the system; empty where it is missing, slow or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def survey(ask: Ask = ask_system, *, platform: str = sys.platform) -> dict[str, Any]:
    """The record of ``machine.describe``, and what else decides how fast this machine is; None: not known."""
    info = mx.device_info()
    wired = info.get("max_recommended_working_set_size")
    found = machine.describe() | {
        "device_architecture": str(info.get("architecture", "")),
        "metal": mx.metal.is_available(),
        "wired_limit_gb": round(int(wired) / 1e9, 1) if wired else None,
        "wired_limit_set_mb": None,
        "performance_cores": None,
        "efficiency_cores": None,
        "gpu_cores": None,
        "on_battery": None,
        "low_power_mode": None,
        "load": None,
    }
    with suppress(OSError, AttributeError):
        found["load"] = round(os.getloadavg()[0], 2)
    return found | (_survey_mac(ask) if platform == "darwin" else {})


def _survey_mac(ask: Ask) -> dict[str, Any]:
    def number(pattern: str, text: str) -> int | None:
        found = re.search(pattern, text)
        return int(found[1]) if found else None

    def sysctl(name: str) -> int | None:
        return number(r"^(\d+)$", ask(["/usr/sbin/sysctl", "-n", name]))

    source = re.search(r"drawing from '(\w+)", ask(["/usr/bin/pmset", "-g", "batt"]))
    mode = number(r"\b(?:low)?powermode\s+(\d)", ask(["/usr/bin/pmset", "-g"]))
    return {
        "wired_limit_set_mb": sysctl("iogpu.wired_limit_mb") or None,
        "performance_cores": sysctl("hw.perflevel0.physicalcpu"),
        "efficiency_cores": sysctl("hw.perflevel1.physicalcpu"),
        "gpu_cores": number(r'"gpu-core-count"\s*=\s*(\d+)', ask(["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d1"])),
        "on_battery": source[1] == "Battery" if source else None,
        "low_power_mode": mode == 1 if mode is not None else None,
    }


def surrounding_findings(found: Mapping[str, Any]) -> list[Finding]:
    """What is to be said about a survey, line by line."""
    looks = (_chip, _memory, _system, _device, _blas, _wired_limit, _power, _load)
    return [look(found) for look in looks]


def _chip(found: Mapping[str, Any]) -> Finding:
    cores = [f"{found[f'{kind}_cores']} {kind}" for kind in ("performance", "efficiency") if found[f"{kind}_cores"]]
    parts = [str(found["processor"]), f"{' and '.join(cores)} cores" if cores else f"{found['cpus']} cores"]
    if found["gpu_cores"]:
        parts.append(f"GPU of {found['gpu_cores']} cores")
    if found["device_architecture"]:
        parts.append(str(found["device_architecture"]))
    return Finding("chip", "ok", ", ".join(parts))


def _memory(found: Mapping[str, Any]) -> Finding:
    size = found["memory_gb"]
    if not size:
        return Finding("memory", "note", "the system does not say how much there is")
    if size < LEAST_MEMORY_GB:
        advice = "use small or 4-bit models, and quit other programs"
        return Finding("memory", "note", f"{size:.1f} GB", advice)
    return Finding("memory", "ok", f"{size:.1f} GB")


def _system(found: Mapping[str, Any]) -> Finding:
    text = f"{found['os']} ({found['system']}, {found['architecture']})"
    chip = re.match(r"Apple M(\d+)", str(found["processor"]))
    version = re.match(r"macOS (\d+)(?:\.(\d+))?", str(found["os"]))
    generation, least = NEURAL_ACCELERATORS
    if chip and version and int(chip[1]) >= generation and (int(version[1]), int(version[2] or 0)) < least:
        advice = f"update to macOS {'.'.join(map(str, least))} or newer: MLX uses the neural accelerators from there on"
        return Finding("system", "note", text, advice)
    return Finding("system", "ok", text)


def _device(found: Mapping[str, Any]) -> Finding:
    if found["device"] == "gpu":
        return Finding("device", "ok", f"MLX computes on the GPU, {found['device_name'] or 'without a name'}")
    if str(found["os"]).startswith("macOS"):
        advice = "Metal is missing, as in some virtual machines; run on the Mac itself"
        return Finding("device", "note", "MLX computes on the CPU", advice)
    return Finding("device", "ok", "MLX computes on the CPU")


def _blas(found: Mapping[str, Any]) -> Finding:
    if found["blas"] == "accelerate":
        return Finding("blas", "ok", "Accelerate")
    if found["blas"] == "openblas":
        threads = found["blas_threads"]
        return Finding("blas", "ok", f"OpenBLAS, {f'{threads} threads asked for' if threads else 'threads not set'}")
    if found["device"] == "gpu":
        return Finding("blas", "ok", "the one of MLX's wheel; the GPU does the work")
    advice = "apt install libopenblas0-pthread, and start programs with scripts/with-openblas (or LD_PRELOAD)"
    return Finding("blas", "note", "the slow reference BLAS of MLX's wheel", advice)


def _wired_limit(found: Mapping[str, Any]) -> Finding:
    limit = found["wired_limit_gb"]
    if limit is None:
        return Finding("wired limit", "ok", "none; only Metal has one")
    chosen = found["wired_limit_set_mb"]
    origin = f"iogpu.wired_limit_mb is {chosen}" if chosen else "macOS's own choice"
    text = f"{limit:.1f} GB ({origin}): weights up to {FULL_SPEED * limit:.1f} GB run at full speed"
    return Finding("wired limit", "ok", text)


def _power(found: Mapping[str, Any]) -> Finding:
    if found["low_power_mode"]:
        return Finding("power", "note", "low power mode", "switch it off in the system settings, and run again")
    if found["on_battery"]:
        return Finding("power", "note", "battery", "connect mains power, and run again: figures may be too low")
    return Finding("power", "ok", "the system does not say" if found["on_battery"] is None else "mains")


def _load(found: Mapping[str, Any]) -> Finding:
    load, cores = found["load"], found["cpus"] or 1
    if load is None:
        return Finding("load", "ok", "the system does not say")
    text = f"{load:.2f} runnable programs on {cores} cores"
    if load > MOST_LOAD * cores:
        return Finding("load", "note", text, "quit other programs, and run again: times below are too long")
    return Finding("load", "ok", text)


def version_finding(versions: Mapping[str, str], asked: Sequence[str] | None = None) -> Finding:
    """Whether the installed releases are those that the package asks for.

    Args:
        asked: requirements as package metadata has them; None: those of the installed package.
    """
    if asked is None:
        try:
            asked = requires("specstream-mlx") or []
        except PackageNotFoundError:  # run from a source tree
            asked = []
    text = ", ".join(f"{name} {release}" for name, release in versions.items())
    wrong = [
        f"{found.name} {versions[found.name]} is not {found.specifier}"
        for found in map(Requirement, asked)
        if found.name in versions
        and (found.marker is None or found.marker.evaluate({"extra": ""}))
        and not found.specifier.contains(versions[found.name], prereleases=True)
    ]
    if wrong:
        return Finding("versions", "note", f"{text}: {'; '.join(wrong)}", "pip install --upgrade specstream-mlx")
    return Finding("versions", "ok", text)
