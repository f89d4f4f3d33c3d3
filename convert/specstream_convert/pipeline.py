"""The conversion: open and check every input, decide, write, verify, rename.

adapter, streams, base -> Plan (every tensor's fate is known, nothing is written)
Plan -> temporary directory -> verification -> the output directory
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from specstream_convert.files.pickles import Pickles
from specstream_convert.options import ConvertOptions
from specstream_convert.plan import Plan, lora_summary, make_plan
from specstream_convert.report import REPORT_NAME, ConversionReport
from specstream_convert.verification.verify import Progress, compare_reference_logits, verify_output
from specstream_convert.writing.output import check_place, check_target
from specstream_convert.writing.write import write_output
from specstream_mlx.formats.config import CONFIG_NAME, PREFIX
from specstream_mlx.formats.fingerprint import sha256_file
from specstream_mlx.formats.output import replaced_directory, write_json
from specstream_mlx.formats.upload import check_upload, upload

CACHE_BYTES = 1 << 26
REPORTED = (
    "adapter_only", "lora_only", "ignore_keys", "key_map", "recompute_init", "dequantize", "allow_pickle", "verify",
)  # fmt: skip


def convert(options: ConvertOptions, progress: Progress | None = None) -> ConversionReport:
    """Convert a PEFT fine-tune with speculative streams to an MLX directory.

    ``progress`` is told ``(stage, done, total)``. With ``options.dry_run`` the report is the plan and nothing is
    written.

    Raises:
        UsageError, InvalidInputError, UnsupportedError, VerificationError: nothing has been written then.
    """
    with Pickles(allowed=options.allow_pickle) as pickles:
        return _convert(options, progress, pickles)


def _convert(options: ConvertOptions, progress: Progress | None, pickles: Pickles) -> ConversionReport:
    options.check()
    if options.upload_repo is not None:
        check_upload(options.upload_repo)
    report = progress or (lambda stage, done, total: None)
    inputs = [path for path in (options.adapter_path, options.streams_path) if path is not None and path.exists()]
    target = Path(options.mlx_path).expanduser()
    replaceable = partial(check_target, target, overwrite=options.overwrite)
    check_place(target, inputs)
    replaceable()
    plan = make_plan(options, pickles)
    check_place(target, [*inputs, plan.base.path])
    if options.dry_run:
        return _report(plan, {}, {}, None)
    with replaced_directory(target, replaceable) as directory, _small_cache():
        hashes = _input_hashes(plan, report)
        files = write_output(plan, directory, hashes, report)
        verification = _verify(plan, directory, report) if options.verify else None
        result = _report(plan, hashes, files, verification)
        write_json(directory / REPORT_NAME, result.to_dict())
    if options.upload_repo is not None:
        upload(target, options.upload_repo)
    return result


@contextlib.contextmanager
def _small_cache() -> Iterator[None]:
    """Let MLX keep few of the buffers it has freed."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _input_hashes(plan: Plan, progress: Progress) -> dict[str, str]:
    paths: dict[str, Path] = {}
    if plan.adapter is not None:
        paths["adapter/" + plan.adapter.config.path.name] = plan.adapter.config.path
        paths |= {"adapter/" + file.path.name: file.path for file in plan.adapter.weights.files}
    of_adapter = set(paths.values())
    for source in plan.streams.tensors.values():
        paths |= {
            "streams/" + row.file.path.name: row.file.path for row in source.rows if row.file.path not in of_adapter
        }
    if plan.config_path is not None:
        paths["streams/" + CONFIG_NAME] = plan.config_path
    paths["base/config.json"] = plan.base.path / "config.json"
    if not plan.options.adapter_only:
        paths |= {"base/" + file.path.name: file.path for file in plan.base.files}
    total, done = sum(path.stat().st_size for path in paths.values()), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("hash", done, total)

    return {name: sha256_file(path, count) for name, path in paths.items()}


def _verify(plan: Plan, directory: Path, progress: Progress) -> dict[str, Any]:
    figures = verify_output(directory, plan, progress)
    if plan.options.reference_logits is not None:
        figures["reference_logits"] = compare_reference_logits(directory, plan.options.reference_logits, plan)
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
        lora=lora_summary(plan),
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
        options={name: getattr(options, name) for name in REPORTED} | {"key_map": options.key_map is not None},
    )


def _own_version() -> dict[str, str]:
    try:
        return {"specstream-mlx": metadata.version("specstream-mlx")}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
