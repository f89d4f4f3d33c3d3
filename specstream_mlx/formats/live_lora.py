"""A LoRA in MLX's form: ``adapters.safetensors`` of mlx-lm, or the ``lora.*`` tensors of a stream adapter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_mlx.errors import SpecStreamError
from specstream_mlx.formats.adapter_directory import LIVE_CONFIG, LIVE_WEIGHTS
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import at, escaped
from specstream_mlx.formats.safetensors import TensorFile, open_tensors

_PARTS = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class LiveAdapter:
    """What it holds; ``lora`` is empty when no configuration says more than the tensors do."""

    num_parameters: int
    lora: dict[str, Any]
    problems: tuple[str, ...]


def is_mlx_lm(directory: Path) -> bool:
    """Whether ``adapter_config.json`` or the weights' name is mlx-lm's and not PEFT's."""
    path = directory / LIVE_CONFIG
    if not path.is_file():
        return (directory / LIVE_WEIGHTS).is_file()
    try:
        raw = read_json(path)
    except SpecStreamError:
        return False
    return "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw)


def read_live_adapter(directory: Path) -> LiveAdapter:
    """Read an adapter that mlx-lm wrote or would load.

    Raises:
        InvalidInputError: its configuration or its weights cannot be read.
    """
    path = directory / LIVE_CONFIG
    raw = read_json(path)
    parameters = raw.get("lora_parameters")
    kind = raw.get("fine_tune_type", "lora")
    problems = []
    rank = scale = None
    if kind not in ("lora", "dora"):
        problems.append(f"{path}: fine_tune_type is {escaped(repr(kind))}, expected 'lora' or 'dora'")
    if not isinstance(parameters, dict):
        problems.append(f"{path}: lora_parameters is {escaped(repr(parameters))}, expected an object")
    else:
        rank, scale = parameters.get("rank"), parameters.get("scale")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            problems.append(f"{path}: lora_parameters.scale is {escaped(repr(scale))}, expected a number")
    if raw.get("num_layers") == 0:
        problems.append(f"{path}: num_layers is 0, which mlx-lm takes for all layers; write -1 for all")
    if not (directory / LIVE_WEIGHTS).exists():
        return LiveAdapter(0, {"rank": rank, "scale": scale}, tuple(problems))
    file = open_tensors(directory / LIVE_WEIGHTS)
    held = lora_shapes(file, {name: name for name in file.tensors})
    ranks = held.lora["ranks"]
    if type(rank) is int and ranks and ranks != [rank]:
        problems.append(f"{path}: lora_parameters.rank is {rank}, the tensors have rank {', '.join(map(str, ranks))}")
    lora = {"fine_tune_type": escaped(str(kind)), "ranks": ranks, "scales": [scale]} | {
        "num_modules": held.lora["num_modules"],
        "num_layers": raw.get("num_layers"),
    }
    return LiveAdapter(held.num_parameters, lora, (*problems, *held.problems))


def lora_shapes(file: TensorFile, names: Mapping[str, str]) -> LiveAdapter:
    """The LoRA among the tensors of ``file``; ``names`` maps ``<module>.lora_a`` and so on to the file's names."""
    modules: dict[str, dict[str, str]] = {}
    problems = []
    for name, raw in names.items():
        module, _, part = name.rpartition(".")
        if not module or part not in _PARTS:
            problems.append(f"{at(file.path, raw)}: not a lora_a, lora_b or m; mlx-lm refuses it, remove it")
            continue
        modules.setdefault(module, {})[part] = raw
        try:
            file.read_finite(raw)
        except SpecStreamError as error:
            problems.append(str(error))
    ranks: set[int] = set()
    for module, parts in sorted(modules.items()):
        if "lora_a" not in parts or "lora_b" not in parts:
            problems.append(f"{file.path}: {escaped(module)} needs both lora_a and lora_b; save the adapter again")
            continue
        a, b = file.tensors[parts["lora_a"]].shape, file.tensors[parts["lora_b"]].shape
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            problems.append(f"{at(file.path, parts['lora_a'])}: shapes {a} and {b} are not (in, r) and (r, out)")
            continue
        ranks.add(a[1])
    return LiveAdapter(
        sum(math.prod(file.tensors[raw].shape) for raw in names.values()),
        {"ranks": sorted(ranks), "num_modules": len(modules)},
        tuple(problems),
    )
