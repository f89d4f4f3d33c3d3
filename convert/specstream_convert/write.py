"""A plan -> the files of the output directory."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from specstream_convert.checks import fingerprint
from specstream_convert.options import DTYPES
from specstream_convert.output import TOKENIZER_FILES, model_card, write_json
from specstream_convert.plan import ADAPTERS, Plan, Progress, lora_summary
from specstream_convert.safetensors_io import TensorOut, sha256_file, write_tensors
from specstream_mlx.config import CONFIG_NAME, LORA_PREFIX, PREFIX, WEIGHTS_NAME
from specstream_mlx.errors import UsageError
from specstream_mlx.families import model_classes

METADATA = {"format": "mlx"}


def write_output(plan: Plan, directory: Path, hashes: dict[str, str], progress: Progress) -> dict[str, dict[str, Any]]:
    """Write all files but the report; return their sizes and digests by relative name."""
    if not plan.options.adapter_only:
        config = _write_weights(plan, directory, progress)
        config.pop("_name_or_path", None)
        write_json(directory / "config.json", config)
        _copy_texts(plan, directory)
    if plan.placement == "live":
        _write_live_adapter(plan, directory)
    if plan.config is not None:
        _write_sidecar(plan, directory, hashes)
    card = model_card(
        base_name=plan.base.name,
        model_type=plan.base.model_type,
        mode=plan.mode,
        placement=plan.placement,
        gamma=plan.config.gamma if plan.config else None,
        adapter_only=plan.options.adapter_only,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    written = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in written
    }


def _write_weights(plan: Plan, directory: Path, progress: Progress) -> dict[str, Any]:
    """Write ``model*.safetensors``; return the configuration that belongs to them."""
    config = dict(plan.base.config)
    if plan.dtype is not None:
        name = next(name for name, short in DTYPES.items() if short == plan.dtype)
        config.pop("torch_dtype", None)
        config["dtype"] = name
    outs = [TensorOut(out.name, out.dtype, out.shape, out.read) for out in plan.outputs]
    total, done = sum(out.num_bytes for out in outs), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("write", done, total)

    if plan.quantization is not None:
        return _write_quantized(plan, directory, outs, config, count)
    weight_map = {out.name: out.file for out in plan.outputs}
    files = sorted(set(weight_map.values()))
    for file in files:
        write_tensors(directory / file, [out for out in outs if weight_map[out.name] == file], METADATA, count)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
    return config


def _write_quantized(
    plan: Plan, directory: Path, outs: list[TensorOut], config: dict[str, Any], count: Callable[[int], None]
) -> dict[str, Any]:
    assert plan.quantization is not None
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    model.load_weights([(out.name, out.value()) for out in outs])
    try:
        with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints a line on stdout
            model, config = quantize_model(model, config, **plan.quantization)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--quantize: {reason}; choose another --q-bits, --q-group-size or --q-mode") from error
    weights = [TensorOut.of(name, value) for name, value in tree_flatten(model.parameters())]
    if not any(out.name.endswith(".scales") for out in weights):
        raise UsageError(
            f"--quantize: no layer's size is a multiple of --q-group-size {plan.quantization['group_size']}; "
            "choose a smaller one"
        )
    write_tensors(directory / "model.safetensors", weights, METADATA, count)
    return config


def _copy_texts(plan: Plan, directory: Path) -> None:
    """Copy tokenizer files and the base's generation_config.json."""
    if plan.tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (plan.tokenizer / name).is_file():
                (directory / name).write_bytes((plan.tokenizer / name).read_bytes())
    generation = plan.base.path / "generation_config.json"
    if generation.is_file():
        (directory / generation.name).write_bytes(generation.read_bytes())


def _write_live_adapter(plan: Plan, directory: Path) -> None:
    """The LoRA in mlx-lm's own format: one rank, one scale, full module paths."""
    assert plan.loras is not None
    (directory / "adapters").mkdir()
    outs = []
    for item in plan.loras.items:
        lora_a, lora_b = plan.loras.live(item)
        outs += [TensorOut.of(f"{item.module}.lora_a", lora_a), TensorOut.of(f"{item.module}.lora_b", lora_b)]
    write_tensors(directory / ADAPTERS, outs, METADATA)
    parameters = {
        "rank": plan.loras.rank,
        "scale": plan.loras.scale,
        "dropout": 0.0,
        "keys": [item.module for item in plan.loras.items],
    }
    write_json(
        directory / "adapters" / "adapter_config.json",
        {"fine_tune_type": "lora", "num_layers": plan.base.num_layers, "lora_parameters": parameters},
    )


def _write_sidecar(plan: Plan, directory: Path, hashes: dict[str, str]) -> None:
    """``specstream.safetensors`` and ``specstream_config.json``."""
    assert plan.config is not None
    outs = [TensorOut.of(PREFIX + name, source.read()) for name, source in plan.streams.tensors.items()]
    if plan.placement == "sidecar":
        assert plan.loras is not None
        for item in plan.loras.items:
            lora_a, lora_b = plan.loras.live(item)
            outs.append(TensorOut.of(f"{LORA_PREFIX}{item.module}.lora_a", lora_a))
            outs.append(TensorOut.of(f"{LORA_PREFIX}{item.module}.lora_b", lora_b))
    write_tensors(directory / WEIGHTS_NAME, outs, METADATA)
    base_model = dict(plan.config.base_model) | plan.base.summary()
    recorded = plan.config.base_model.get("name_or_path")
    if isinstance(recorded, str) and "/" in recorded and not recorded.startswith(("/", ".", "~")):
        base_model["name_or_path"] = recorded
    base_model.pop("fingerprint", None)
    marked = plan.base.family.fingerprint_tensor(plan.base.config)
    if marked is not None:
        dtype = None if plan.options.adapter_only else plan.dtype
        base_model["fingerprint"] = fingerprint(plan.base, marked, dtype)
    config = replace(plan.config, base_model=base_model, lora=lora_summary(plan), source={"sha256": hashes})
    write_json(directory / CONFIG_NAME, config.to_dict())
