"""The conversion: open and check every input, decide, write, verify, rename.

adapter, streams, base -> Plan (every tensor's fate is known, nothing is written)
Plan -> temporary directory -> verification -> the output directory
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

from specstream_convert.adapter import (
    Adapter,
    LoraPair,
    compile_ignored,
    find_adapter,
    open_adapter,
    read_renames,
    stream_file,
)
from specstream_convert.base import Base, open_base, resolve_base
from specstream_convert.checks import check_base_matches, check_coverage, check_lossless, fingerprint
from specstream_convert.merge import Lora, LoraSet, cast, check_effect, merged
from specstream_convert.messages import at, escaped, listing
from specstream_convert.options import DTYPES, ConvertOptions
from specstream_convert.output import (
    TOKENIZER_FILES,
    OutputDirectory,
    check_tokenizer,
    model_card,
    tokenizer_directory,
    write_json,
)
from specstream_convert.peft_config import MERGE_IN_PEFT
from specstream_convert.report import REPORT_NAME, ConversionReport, TensorFate
from specstream_convert.safetensors_io import (
    FLOATS,
    TensorFile,
    TensorOut,
    open_tensors,
    sha256_file,
    write_tensors,
)
from specstream_convert.streams_in import (
    PREFIX,
    WHY_NO_STREAMS,
    StreamSource,
    check_streams,
    from_stream_file,
    gather,
    join,
    read_stream_config,
)
from specstream_convert.verify import Expected, compare_reference_logits, read_reference_logits, verify_output
from specstream_mlx.config import CONFIG_NAME, WEIGHTS_NAME, StreamConfig
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError

Progress = Callable[[str, int, int], None]
ADAPTERS = "adapters/adapters.safetensors"
METADATA = {"format": "mlx"}


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first byte is written."""

    options: ConvertOptions
    base: Base
    adapter: Adapter | None
    loras: LoraSet | None
    streams: StreamSource
    config: StreamConfig | None
    config_path: Path | None
    placement: str  # merged, live, sidecar or none
    dtype: str | None
    quantization: dict[str, Any] | None
    tokenizer: Path | None
    fates: tuple[TensorFate, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def mode(self) -> str | None:
        return self.config.mode if self.config else None


def convert(options: ConvertOptions, progress: Progress | None = None) -> ConversionReport:
    """Convert a PEFT fine-tune with speculative streams to an MLX directory.

    ``progress`` is told ``(stage, done, total)``. With ``options.dry_run`` the report is the plan and nothing is
    written.

    Raises:
        UsageError, InvalidInputError, UnsupportedError, VerificationError: nothing has been written then.
    """
    options.check()
    report = progress or (lambda stage, done, total: None)
    inputs = [path for path in (options.adapter_path, options.streams_path) if path is not None and path.exists()]
    OutputDirectory(options.mlx_path, overwrite=options.overwrite, inputs=inputs)
    plan = make_plan(options, report)
    output = OutputDirectory(options.mlx_path, overwrite=options.overwrite, inputs=[*inputs, plan.base.path])
    if options.dry_run:
        return _report(plan, {}, {}, None)
    with output as directory:
        try:
            hashes = _input_hashes(plan, report)
            files = _write(plan, directory, hashes, report)
            verification = _verify(plan, directory, report) if options.verify else None
            result = _report(plan, hashes, files, verification)
            write_json(directory / REPORT_NAME, result.to_dict())
        except OSError as error:
            raise UsageError(f"{options.mlx_path}: cannot be written ({error.strerror or error})") from error
        output.commit()
    if options.upload_repo is not None:
        _upload(output.target, options.upload_repo)
    return result


def make_plan(options: ConvertOptions, progress: Progress) -> Plan:
    """Open and check all inputs; nothing is written."""
    renames, ignored = read_renames(options.key_map), compile_ignored(options.ignore_keys)
    adapter = None
    if options.adapter_path is not None:
        directory = find_adapter(options.adapter_path, options.adapter_name)
        adapter = open_adapter(directory, options.adapter_name, renames, ignored)
    streams, config, config_path, stream_fates = _open_streams(options, adapter, renames, ignored)
    base = _open_base(options, adapter, config)
    notes = [*base.notes, *streams.notes]
    warnings = list(base.warnings)
    fates = list(stream_fates)
    loras: LoraSet | None = None
    if adapter is not None:
        notes += adapter.notes
        warnings += adapter.config.notes
        items, map_notes = _map_modules(adapter, base)
        notes += map_notes
        fates += [*adapter.fates, *_saved_copies(adapter, base)]
        check_coverage(adapter.config, items, base, config)
        loras = LoraSet(items) if items else None
    if config is not None:
        assert config_path is not None
        check_base_matches(config, config_path, base)
        warnings += check_streams(streams, config, base.hidden_size, config_path)
        if config.mode == "lossless" and loras is not None:
            check_lossless(loras.items, config, base)
    if loras is not None:
        warnings += check_effect(loras.items)
    elif adapter is not None and (config is None or config.mode == "shared"):
        raise InvalidInputError(f"{adapter.file.path}: holds no LoRA tensor; give the streams alone as --streams-path")
    placement = _placement(options, base, loras, config)
    if loras is not None:
        fates += _lora_fates(loras, placement)
    tokenizer = None
    if not options.adapter_only:
        tokenizer = tokenizer_directory(adapter.directory if adapter else None, base.path)
        if tokenizer is None:
            notes.append("no tokenizer files were found in the adapter or the base; the output has none")
        else:
            check_tokenizer(tokenizer, int(base.config["vocab_size"]))
    plan = Plan(
        options=options,
        base=base,
        adapter=adapter,
        loras=loras,
        streams=streams,
        config=config,
        config_path=config_path,
        placement=placement,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        quantization=_quantization(options, base),
        tokenizer=tokenizer,
        fates=tuple(fates),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )
    if options.reference_logits is not None:
        read_reference_logits(options.reference_logits, int(base.config["vocab_size"]))
    if not options.adapter_only:
        plan = replace(plan, fates=plan.fates + _base_fates(plan))
    return plan


def _open_streams(
    options: ConvertOptions, adapter: Adapter | None, renames: dict[str, str], ignored: Any
) -> tuple[StreamSource, StreamConfig | None, Path | None, tuple[TensorFate, ...]]:
    form_a = gather(adapter.file, adapter.streams) if adapter else None
    if options.lora_only:
        if form_a is not None and form_a.tensors:
            raise UsageError(
                f"{form_a.fates[0].file}: holds stream tensors; leave out --lora-only, or drop them with "
                "--ignore-keys '.*specstream.*'"
            )
        return StreamSource({}, (), ()), None, None, ()
    homes = _homes(options, adapter)
    path = options.streams_path
    if path is None:
        path = next((home for home in homes if (home / WEIGHTS_NAME).exists()), None)
    form_b = from_stream_file(open_tensors(stream_file(path)), renames, ignored) if path is not None else None
    streams = join(form_a, form_b)
    config_path = options.specstream_config
    if config_path is None:
        config_path = next((home / CONFIG_NAME for home in homes if (home / CONFIG_NAME).exists()), None)
    if config_path is None:
        config_path = homes[0] / CONFIG_NAME
    if not streams.tensors and not config_path.exists():
        where = adapter.file.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    config = read_stream_config(config_path, streams)
    if not streams.tensors and config.tensor_shapes(1):
        where = adapter.file.path if adapter else path
        raise InvalidInputError(f"{where}: {WHY_NO_STREAMS}")
    return streams, config, config_path, streams.fates


def _homes(options: ConvertOptions, adapter: Adapter | None) -> list[Path]:
    """Directories where the stream file and configuration are looked for, nearest first."""
    homes = []
    if options.streams_path is not None:
        homes.append(options.streams_path if options.streams_path.is_dir() else options.streams_path.parent)
    if adapter is not None:
        homes.append(adapter.directory)
    if options.adapter_path is not None and options.adapter_path not in homes:
        homes.append(options.adapter_path)
    return homes


def _open_base(options: ConvertOptions, adapter: Adapter | None, config: StreamConfig | None) -> Base:
    revision: str | None = None
    if options.hf_path is not None:
        path, name = resolve_base(options.hf_path, None)
    else:
        assert adapter is not None
        named = adapter.config.base_model
        if named is None:
            raise InvalidInputError(
                f"{adapter.config.path}: base_model_name_or_path is missing; give the base model with --hf-path"
            )
        revision = adapter.config.revision
        recorded = config.base_model if config else {}
        if revision is None and recorded.get("name_or_path") == named and isinstance(recorded.get("revision"), str):
            revision = recorded["revision"]
        path, name = resolve_base(named, revision, relative_to=adapter.directory)
    return open_base(path, name, revision)


def _map_modules(adapter: Adapter, base: Base) -> tuple[tuple[Lora, ...], list[str]]:
    """Match PEFT's module paths with mlx-lm's; every module must exist and fit."""
    names = [pair.module for pair in adapter.pairs]
    strip, add = _prefix(names, base)
    notes = []
    if strip or add:
        change = f"'{escaped(strip)}' removed from" if strip else f"'{add}' put before"
        notes.append(f"{adapter.file.path.name}: prefix {change} every module path")
    problems, items = [], []
    for pair in adapter.pairs:
        module = add + pair.module.removeprefix(strip)
        problem = _module_problem(pair, module, adapter, base)
        if problem:
            problems.append(problem)
        else:
            items.append(Lora(module, pair, adapter.config.scale_of(pair.module)))
    if problems:
        named = adapter.config.base_model or "an unnamed base"
        raise InvalidInputError(
            listing([*problems, f"the adapter was trained on {escaped(named)}, the base given is {base.name}"])
        )
    return tuple(items), notes


def _prefix(names: list[str], base: Base) -> tuple[str, str]:
    """The one prefix to remove from, or to put before, every module path so that all of them exist."""
    if not names or all(name in base.linear for name in names):
        return "", ""
    if all(f"model.{name}" in base.linear for name in names):
        return "", "model."
    fits = [known for known in base.linear if names[0].endswith("." + known)]
    for known in fits:
        prefix = names[0].removesuffix(known)
        if all(name.startswith(prefix) and name.removeprefix(prefix) in base.linear for name in names):
            return prefix, ""
    return "", ""


def _module_problem(pair: LoraPair, module: str, adapter: Adapter, base: Base) -> str | None:
    place = at(pair.file.path, pair.a)
    if module not in base.linear:
        if module == "lm_head" and base.config["tie_word_embeddings"]:
            raise UnsupportedError(
                f"{place}: LoRA on the LM head of a base with tied embeddings is not supported; {MERGE_IN_PEFT}"
            )
        return f"{place}: the base has no linear layer {escaped(module)}"
    if pair.shape != base.linear[module]:
        return f"{place}: fits a weight of shape {pair.shape}, the base's is {base.linear[module]} (out, in)"
    rank = adapter.config.rank_of(pair.module)
    if rank != pair.rank:
        return f"{place}: rank {pair.rank}, but adapter_config.json says {rank}, so its scale is not known"
    return None


def _saved_copies(adapter: Adapter, base: Base) -> list[TensorFate]:
    """Full tensors in the adapter file: dropped when they are the base's own bits, otherwise refused."""
    fates, unknown, changed = [], [], []
    for name, raw in adapter.saved.items():
        place = at(adapter.file.path, raw)
        target = next((n for n in (name, f"model.{name}") if n in base.parameters), None)
        if target is None and name == "lm_head.weight" and base.config["tie_word_embeddings"]:
            target = "model.embed_tokens.weight"
        if target is None or base.quantized:
            unknown.append(
                f"{place}: not a tensor this converter knows; map it with --key-map or drop it with --ignore-keys"
            )
            continue
        ours, theirs = adapter.file.tensors[raw], base.info(target)
        if ours.shape == theirs.shape and ours.dtype in FLOATS:
            value, original = adapter.file.read(raw), base.tensors[target].read(target)
            same = value.astype(mx.float32) == original.astype(value.dtype).astype(mx.float32)
            if bool(same.all().item()):
                fates.append(TensorFate(adapter.file.path.name, raw, f"equal to the base's {target}, dropped"))
                continue
        changed.append(f"{place}: a trained or resized copy of {target} is not supported; {MERGE_IN_PEFT}")
    if unknown:
        raise InvalidInputError(listing(unknown + changed))
    if changed:
        raise UnsupportedError(listing(changed))
    return fates


def _placement(options: ConvertOptions, base: Base, loras: LoraSet | None, config: StreamConfig | None) -> str:
    """Where the LoRA goes."""
    if config is not None and config.mode == "lossless":
        if options.fuse:
            raise UsageError("--fuse contradicts mode lossless: the LoRA may act on stream rows only; leave it out")
        return "sidecar" if loras is not None else "none"
    if loras is None:
        return "none"
    if options.adapter_only:
        return "live"
    if options.fuse and base.quantized:
        raise UnsupportedError(
            f"{base.path}: the base is quantised, and merging into it keeps 12-23% of a small LoRA; give the "
            "full-precision base with --hf-path (and --quantize), or --keep-adapters"
        )
    if options.fuse is None:
        return "live" if base.quantized else "merged"
    return "merged" if options.fuse else "live"


def _quantization(options: ConvertOptions, base: Base) -> dict[str, Any] | None:
    if base.quantized and (options.quantize or options.dtype):
        raise UsageError(f"{base.path}: the base is already quantised; leave out --quantize and --dtype")
    if not options.quantize:
        return None
    return {"group_size": options.q_group_size, "bits": options.q_bits, "mode": options.q_mode}


def _lora_fates(loras: LoraSet, placement: str) -> list[TensorFate]:
    fates = []
    for item in loras.items:
        targets = {
            "merged": (f"model:{item.module}.weight",) * 2,
            "live": (f"{ADAPTERS}:{item.module}.lora_a", f"{ADAPTERS}:{item.module}.lora_b"),
            "sidecar": (f"{WEIGHTS_NAME}:lora.{item.module}.lora_a", f"{WEIGHTS_NAME}:lora.{item.module}.lora_b"),
        }[placement]
        what = "merged" if placement == "merged" else "transposed"
        for raw, target in zip((item.pair.a, item.pair.b), targets, strict=True):
            fates.append(TensorFate(item.pair.file.path.name, raw, what, target))
    return fates


def _base_fates(plan: Plan) -> tuple[TensorFate, ...]:
    changed = plan.loras.by_weight() if plan.loras and plan.placement == "merged" else {}
    fates = []
    for file, output in _shards(plan):
        for name in sorted(file.tensors):
            if name in plan.base.dropped:
                fates.append(TensorFate(file.path.name, name, f"dropped: {plan.base.dropped[name]}"))
                continue
            what = "merged with LoRA" if name in changed else "copied"
            if _stored(plan, name) != plan.base.info(name).dtype:
                what += f", cast to {_stored(plan, name)}"
            if plan.quantization is not None:
                what += ", quantised where the layer allows"
            fates.append(TensorFate(file.path.name, name, what, f"{output}:{name}"))
    return tuple(fates)


def _shards(plan: Plan) -> list[tuple[TensorFile, str]]:
    """Each input file and the output file its tensors go to; a quantised output is written as one file."""
    files = plan.base.files
    if len(files) == 1 or plan.quantization is not None:
        return [(file, "model.safetensors") for file in files]
    return [(file, f"model-{i + 1:05d}-of-{len(files):05d}.safetensors") for i, file in enumerate(files)]


def _stored(plan: Plan, name: str) -> str:
    found = plan.base.info(name).dtype
    return plan.dtype if plan.dtype is not None and found in FLOATS else found


def _input_hashes(plan: Plan, progress: Progress) -> dict[str, str]:
    paths: dict[str, Path] = {}
    if plan.adapter is not None:
        paths["adapter/" + plan.adapter.config.path.name] = plan.adapter.config.path
        paths["adapter/" + plan.adapter.file.path.name] = plan.adapter.file.path
    for source in plan.streams.tensors.values():
        if plan.adapter is None or source.file.path != plan.adapter.file.path:
            paths["streams/" + source.file.path.name] = source.file.path
    if plan.config_path is not None:
        paths["streams/" + CONFIG_NAME] = plan.config_path
    paths["base/config.json"] = plan.base.path / "config.json"
    if not plan.options.adapter_only:
        paths |= {"base/" + file.path.name: file.path for file in plan.base.files}
    hashes = {}
    for i, (name, path) in enumerate(paths.items()):
        hashes[name] = sha256_file(path)
        progress("hash", i + 1, len(paths))
    return hashes


def _write(plan: Plan, directory: Path, hashes: dict[str, str], progress: Progress) -> dict[str, dict[str, Any]]:
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
    outs = {name: _tensor_out(plan, name) for name in plan.base.tensors}
    total, done = sum(out.num_bytes for out in outs.values()), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("write", done, total)

    if plan.quantization is not None:
        return _write_quantized(plan, directory, outs, config, count)
    weight_map: dict[str, str] = {}
    for file, output in _shards(plan):
        names = [name for name in file.tensors if name in outs]
        write_tensors(directory / output, [outs[name] for name in names], METADATA, count)
        weight_map |= dict.fromkeys(names, output)
    if len(plan.base.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
    return config


def _tensor_out(plan: Plan, name: str) -> TensorOut:
    changed = plan.loras.by_weight() if plan.loras and plan.placement == "merged" else {}
    file, info, stored = plan.base.tensors[name], plan.base.info(name), _stored(plan, name)
    item = changed.get(name)

    def value() -> mx.array:
        if item is not None:
            return cast(merged(file.read_float32(name), item), stored, at(file.path, name))
        if info.dtype not in FLOATS:
            return file.read(name)
        return cast(file.read_finite(name), stored, at(file.path, name))

    return TensorOut(name, stored, info.shape, value)


def _write_quantized(
    plan: Plan, directory: Path, outs: dict[str, TensorOut], config: dict[str, Any], count: Callable[[int], None]
) -> dict[str, Any]:
    assert plan.quantization is not None
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.load_weights([(name, out.value()) for name, out in outs.items()])
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
            outs.append(TensorOut.of(f"lora.{item.module}.lora_a", lora_a))
            outs.append(TensorOut.of(f"lora.{item.module}.lora_b", lora_b))
    write_tensors(directory / WEIGHTS_NAME, outs, METADATA)
    base_model = dict(plan.config.base_model) | plan.base.summary()
    recorded = plan.config.base_model.get("name_or_path")
    if isinstance(recorded, str) and "/" in recorded and not recorded.startswith(("/", ".", "~")):
        base_model["name_or_path"] = recorded
    base_model["fingerprint"] = fingerprint(plan.base, dtype=None if plan.options.adapter_only else plan.dtype)
    config = replace(plan.config, base_model=base_model, lora=_lora_summary(plan), source={"sha256": hashes})
    write_json(directory / CONFIG_NAME, config.to_dict())


def _lora_summary(plan: Plan) -> dict[str, Any] | None:
    if plan.loras is None or plan.adapter is None:
        return None
    return {
        "rank": plan.loras.rank,
        "scale": plan.loras.scale,
        "placement": plan.placement,
        "num_modules": len(plan.loras.items),
        "use_rslora": plan.adapter.config.use_rslora,
        "ranks": sorted({item.pair.rank for item in plan.loras.items}),
        "scales": sorted({item.scale for item in plan.loras.items}),
    }


def _verify(plan: Plan, directory: Path, progress: Progress) -> dict[str, Any]:
    expected = Expected(
        base=plan.base,
        loras=plan.loras,
        placement=plan.placement,
        dtype=plan.dtype,
        quantization=plan.quantization,
        streams=plan.streams,
    )
    figures = verify_output(directory, expected, lambda done, total: progress("verify", done, total))
    if plan.options.reference_logits is not None:
        figures["reference_logits"] = compare_reference_logits(directory, plan.options.reference_logits, expected)
    return figures


def _report(
    plan: Plan,
    hashes: dict[str, str],
    files: dict[str, dict[str, Any]],
    verification: dict[str, Any] | None,
) -> ConversionReport:
    options = plan.options
    streams = None
    if plan.config is not None:
        shapes = plan.config.tensor_shapes(plan.base.hidden_size)
        streams = {
            "gamma": plan.config.gamma,
            "num_stream_layers": plan.config.num_stream_layers,
            "stream_position": plan.config.stream_position,
            "tensors": {PREFIX + name: list(shape) for name, shape in shapes.items()},
        }
    return ConversionReport(
        mode=plan.mode,
        placement=plan.placement,
        base=plan.base.summary() | {"quantized": plan.base.quantized},
        lora=_lora_summary(plan),
        streams=streams,
        tensors=plan.fates,
        notes=plan.notes,
        warnings=plan.warnings,
        versions={name: metadata.version(name) for name in ("mlx", "mlx-lm", "safetensors")} | _own_version(),
        input_hashes=hashes,
        output_files=files,
        verification=verification,
        quantization=plan.quantization,
        dtype=options.dtype,
        dry_run=options.dry_run,
        options={
            "adapter_only": options.adapter_only,
            "lora_only": options.lora_only,
            "ignore_keys": options.ignore_keys,
            "key_map": options.key_map is not None,
            "verify": options.verify,
        },
    )


def _own_version() -> dict[str, str]:
    try:
        return {"specstream-mlx": metadata.version("specstream-mlx")}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}


def _upload(directory: Path, repo: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repo, repo_type="model")
    except Exception as error:  # the hub raises many kinds: offline, forbidden, bad name
        reason = escaped(" ".join(str(error).split()))
        raise UsageError(f"{directory} is complete, but uploading to {escaped(repo)} failed: {reason}") from error
