"""Published heads -> an adapter directory: planned, written, read back and compared."""

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from specstream_convert.base.model import Base, open_base, resolve_base
from specstream_convert.checks import fingerprint
from specstream_convert.files.pickles import Pickles
from specstream_convert.heads.plan import HeadPlan, plan_heads
from specstream_convert.heads.source import HeadSource, open_heads
from specstream_convert.options import DTYPES, ConvertOptions
from specstream_convert.report import REPORT_NAME, ConversionReport, TensorFate, versions
from specstream_convert.verification.verify import Progress
from specstream_convert.writing.output import check_place, check_target
from specstream_mlx.drafters.heads import HEADS
from specstream_mlx.errors import InvalidInputError, VerificationError
from specstream_mlx.formats.drafter_config import DRAFTER_CONFIG, DRAFTER_WEIGHTS, DrafterConfig
from specstream_mlx.formats.fingerprint import sha256_file
from specstream_mlx.formats.messages import listing
from specstream_mlx.formats.output import replaced_directory, write_json
from specstream_mlx.formats.safetensors import mlx_dtype, open_tensors
from specstream_mlx.formats.tensor_writer import Entry, TensorOut, write_tensors
from specstream_mlx.models.heads import check_tensors, read_drafter_config


def convert_heads(options: ConvertOptions, heads: Path, progress: Progress, pickles: Pickles) -> ConversionReport:
    """Convert the heads in a directory.

    Raises:
        UsageError, InvalidInputError, UnsupportedError, VerificationError: nothing has been written then.
    """
    target = Path(options.mlx_path).expanduser()
    replaceable = partial(check_target, target, overwrite=options.overwrite)
    check_place(target, [heads])
    replaceable()
    source = open_heads(heads, pickles)
    base = _base(options, pickles)
    plan = plan_heads(source, base)
    _check_shapes(source, plan)
    check_place(target, [source.directory, *([base.path] if base is not None else [])])
    plan.notes += pickles.notes
    hashes = {file.path.name: file.sha256() for file in source.files} | {"config.json": sha256_file(source.config_path)}
    config = DrafterConfig(plan.kind, plan.settings, _base_block(plan, base), source={"sha256": hashes})
    if options.dry_run:
        return _report(options, plan, config, hashes, {}, None)
    with replaced_directory(target, replaceable) as directory:
        outs = [_out(name, tensor, options.dtype) for name, tensor in plan.tensors.items()]
        digest = write_tensors(directory / DRAFTER_WEIGHTS, outs, done=_counter(outs, progress))
        write_json(directory / DRAFTER_CONFIG, config.to_dict())
        verification = _verify(directory, plan) if options.verify else None
        written = {DRAFTER_WEIGHTS: digest, DRAFTER_CONFIG: sha256_file(directory / DRAFTER_CONFIG)}
        files = {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256}
            for name, sha256 in sorted(written.items())
        }
        report = _report(options, plan, config, hashes, files, verification)
        write_json(directory / REPORT_NAME, report.to_dict())
    return report


def _base(options: ConvertOptions, pickles: Pickles) -> Base | None:
    if options.hf_path is None:
        return None
    path, name, revision = resolve_base(options.hf_path, options.revision, pickled=pickles.allowed)
    return open_base(path, name, revision, pickles=pickles)


def _base_block(plan: HeadPlan, base: Base | None) -> dict[str, Any]:
    """What the head's configuration says of its base: all of the base at hand, else what the head itself tells."""
    if base is None:
        sizes = {"hidden_size": plan.sizes.hidden_size, "vocab_size": plan.sizes.vocab_size}
        return ({"name_or_path": plan.named} if plan.named else {}) | sizes
    marked = base.family.fingerprint_tensor(base.config)
    mark = {"fingerprint": fingerprint(base, marked, None, None)} if marked is not None else {}
    return base.summary() | mark


def _check_shapes(source: HeadSource, plan: HeadPlan) -> None:
    """Compare the tensors with what the drafter of this kind needs."""
    head = HEADS[plan.kind].from_settings(plan.settings, plan.sizes, str(source.config_path))
    problems = []
    for name, needed in tree_flatten(head.weights.parameters()):
        tensor = plan.tensors.get(name)
        if tensor is None:
            problems.append(f"{source.directory}: {name}: missing; download it again")
        elif tuple(tensor.shape) != tuple(needed.shape):
            place = getattr(tensor, "place", f"{source.directory}:{name}")
            problems.append(f"{place}: shape {tuple(tensor.shape)}, config.json needs {tuple(needed.shape)}")
    if problems:
        raise InvalidInputError(listing(problems))


def _out(name: str, tensor: Any, dtype: str | None) -> TensorOut:
    """A tensor to be written block by block, in the type asked for."""
    if isinstance(tensor, mx.array):
        return TensorOut.of(name, tensor)
    kind = DTYPES[dtype] if dtype else tensor.dtype
    target = mlx_dtype(kind)
    return TensorOut(
        (Entry(name, kind, tensor.shape),),
        lambda: ((block.astype(target),) for _, block in tensor.blocks(finite=True)),
    )


def _counter(outs: list[TensorOut], progress: Progress) -> Any:
    total, done = sum(out.num_bytes for out in outs), 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("write", done, total)

    return count


def _verify(directory: Path, plan: HeadPlan) -> dict[str, Any]:
    """Read the output as ``load`` does and compare every value with the source."""
    config = read_drafter_config(directory)
    head = HEADS[config.kind].from_settings(config.settings, plan.sizes, str(directory / DRAFTER_CONFIG))
    check_tensors(head, directory / DRAFTER_WEIGHTS)
    written, worst = open_tensors(directory / DRAFTER_WEIGHTS), 0.0
    for name, tensor in plan.tensors.items():
        if isinstance(tensor, mx.array):
            equal = mx.array_equal(written.read(name), tensor).item()
            error = 0.0 if equal else float("inf")
        else:
            pairs = zip(written.blocks(name), tensor.blocks(), strict=True)
            errors = [mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max() for (_, a), (_, b) in pairs]
            scale = max(float(mx.abs(block.astype(mx.float32)).max()) for _, block in tensor.blocks())
            rounding = 0.0 if written.tensors[name].dtype == tensor.dtype else scale * 2**-8
            error = max(float(value) for value in errors)
            if error <= rounding:
                worst = max(worst, error)
                continue
        if error > 0:
            raise VerificationError(f"{directory.name}:{name}: differs from the source by {error:.3g}; report this")
    return {"head": {"checked": len(plan.tensors), "max_abs_error": worst}}


def _report(
    options: ConvertOptions,
    plan: HeadPlan,
    config: DrafterConfig,
    hashes: dict[str, str],
    files: dict[str, dict[str, Any]],
    verification: dict[str, Any] | None,
) -> ConversionReport:
    fates = tuple(
        TensorFate("heads", name, fate, f"{DRAFTER_WEIGHTS}:{ours}" if ours else None)
        for name, (fate, ours) in plan.fates.items()
    )
    return ConversionReport(
        mode=None,
        placement="none",
        base=config.base_model,
        lora=None,
        streams=None,
        tensors=fates,
        notes=tuple(plan.notes),
        warnings=(),
        quantization=None,
        versions=versions(),
        input_hashes=hashes,
        output_files=files,
        verification=verification,
        dtype=options.dtype,
        dry_run=options.dry_run,
        options={"allow_pickle": options.allow_pickle, "verify": options.verify},
        head={"kind": plan.kind, **plan.settings},
    )
