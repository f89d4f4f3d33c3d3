"""A plan -> the files of the output directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from specstream_convert.changes.lora import LoraSet
from specstream_convert.checks import fingerprint
from specstream_convert.options import DTYPES
from specstream_convert.plan import Plan, lora_summary
from specstream_convert.verification.verify import Progress
from specstream_convert.writing.output import TOKENIZER_FILES, model_card
from specstream_mlx.formats.adapter_directory import LiveLora, write_live, write_streams
from specstream_mlx.formats.config import LORA_PREFIX, PREFIX
from specstream_mlx.formats.fingerprint import sha256_file
from specstream_mlx.formats.output import write_json
from specstream_mlx.formats.places import is_repository_id
from specstream_mlx.formats.tensor_writer import Entry, TensorOut, write_tensors


def write_output(plan: Plan, directory: Path, hashes: dict[str, str], progress: Progress) -> dict[str, dict[str, Any]]:
    """Write all files but the report; return their sizes and digests by relative name."""
    digests: dict[str, str] = {}
    if not plan.options.adapter_only:
        config = _write_weights(plan, directory, digests, progress)
        config.pop("_name_or_path", None)
        write_json(directory / "config.json", config)
        _copy_texts(plan, directory)
    if plan.placement == "live":
        _write_live_adapter(plan, directory)
    if plan.config is not None:
        _write_sidecar(plan, directory, hashes)
    card = model_card(
        plan.base.name, plan.base.model_type, plan.config, plan.placement, plan.options.adapter_only, _remarks(plan)
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
    written = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {
        name: {"bytes": path.stat().st_size, "sha256": digests.get(name) or sha256_file(path)}
        for name, path in sorted(written.items())
    }


def _remarks(plan: Plan) -> list[str]:
    """What a reader of the model card should know of the weights."""
    remarks = []
    if plan.options.dequantize:
        remarks.append("The base was dequantised, so this is an approximation of the model that was trained on.")
    if plan.options.recompute_init:
        remarks.append("What the adapter's initialisation took out of the base was recomputed.")
    if plan.quantization is not None:
        how = plan.quantization
        remarks.append(f"Quantised after the merge: {how['bits']} bits, groups of {how['group_size']}, {how['mode']}.")
    return remarks


def _write_weights(plan: Plan, directory: Path, digests: dict[str, str], progress: Progress) -> dict[str, Any]:
    """Write ``model*.safetensors`` and note their digests; return the configuration that belongs to them."""
    config = dict(plan.base.config) if plan.quantized is None else plan.quantized.config
    if plan.dtype is not None:
        name = next(name for name, short in DTYPES.items() if short == plan.dtype)
        config.pop("torch_dtype", None)
        config["dtype"] = name
    files: dict[str, list[TensorOut]] = {}
    for output in plan.outputs:
        out = output.tensor_out() if plan.quantized is None else plan.quantized.tensor_out(output)
        files.setdefault(output.file, []).append(out)
    total, done = sum(out.num_bytes for outs in files.values() for out in outs), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("write", done, total)

    for file, outs in sorted(files.items()):
        digests[file] = write_tensors(directory / file, outs, done=count)
    if len(files) > 1:
        weight_map = {entry.name: file for file, outs in files.items() for out in outs for entry in out.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
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
    """LoRA or DoRA in mlx-lm's own format: one rank, one scale, full module paths."""
    loras = plan.loras
    assert loras is not None
    modules = [item.module for item in loras.items]
    write_live(directory, LiveLora(loras.rank, loras.scale, modules, plan.base.num_layers, loras.dora), _live(loras))


def _live(loras: LoraSet, prefix: str = "") -> list[TensorOut]:
    """LoRA and DoRA of every module, each module made when written: padded, they may be many times the input."""
    outs = []
    for item in loras.items:
        sides = zip(("lora_a", "lora_b"), loras.live_shapes(item), strict=True)
        entries = tuple(Entry(f"{prefix}{item.module}.{side}", "F32", shape) for side, shape in sides)
        outs.append(TensorOut(entries, lambda item=item: [loras.live(item)]))  # type: ignore[misc]
        if item.magnitude is not None:
            outs.append(TensorOut.of(f"{prefix}{item.module}.m", item.magnitude.read_float32()))
    return outs


def _write_sidecar(plan: Plan, directory: Path, hashes: dict[str, str]) -> None:
    """``specstream.safetensors`` and ``specstream_config.json``."""
    assert plan.config is not None
    outs = [TensorOut.of(PREFIX + name, source.read()) for name, source in plan.streams.tensors.items()]
    if plan.placement == "sidecar":
        assert plan.loras is not None
        outs += _live(plan.loras, LORA_PREFIX)
    base_model = dict(plan.config.base_model) | plan.base.summary()
    recorded = plan.config.base_model.get("name_or_path")
    if isinstance(recorded, str) and is_repository_id(recorded):
        base_model["name_or_path"] = recorded
    base_model.pop("fingerprint", None)
    marked = plan.base.family.fingerprint_tensor(plan.base.config)
    if marked is not None:
        dtype = None if plan.options.adapter_only else plan.dtype
        base_model["fingerprint"] = fingerprint(plan.base, marked, dtype, plan.replacement(marked))
    config = replace(plan.config, base_model=base_model, lora=lora_summary(plan), source={"sha256": hashes})
    write_streams(directory, config, outs)
