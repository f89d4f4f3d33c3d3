"""``specstream-mlx convert``: a PyTorch fine-tune becomes an MLX model directory."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from specstream_cli.options import Revision, place_of
from specstream_cli.signals import terminated_like_interrupted
from specstream_cli.tables import table
from specstream_cli.terminal import answer, progress_bar, quieten_libraries, to_stderr
from specstream_cli.validation import is_repo_id, regular_expression, repo_id, within
from specstream_mlx.errors import UsageError
from specstream_mlx.options import DType, QuantizationMode


def convert(
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path", "--model", help="Base model, directory or repository; default: the one the adapter names."
        ),
    ] = None,
    revision: Revision = None,
    adapter_path: Annotated[Path | None, typer.Option(help="PEFT directory (adapter_config.json and weights).")] = None,
    adapter_name: Annotated[str | None, typer.Option(help="Which adapter, where the directory holds several.")] = None,
    streams_path: Annotated[
        Path | None, typer.Option(help="specstream.safetensors or its directory, where not in the adapter.")
    ] = None,
    specstream_config: Annotated[
        Path | None, typer.Option(help="specstream_config.json, where not beside the weights.")
    ] = None,
    mlx_path: Annotated[Path, typer.Option(help="Directory to write; must not exist.")] = Path("mlx_model"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")] = False,
    fuse: Annotated[
        bool | None,
        typer.Option("--fuse/--keep-adapters", help="Merge LoRA into the base, or keep it beside; default: by mode."),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the stream adapter alone, without the base.")
    ] = False,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantise the base, after the merge.")] = False,
    q_bits: Annotated[
        int | None, typer.Option(callback=within(2, 8), help="Bits per weight; default 4. Needs --quantize.")
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(callback=within(1), help="Weights per scale; default 64. Needs --quantize.")
    ] = None,
    q_mode: Annotated[
        QuantizationMode | None, typer.Option(help="Quantisation format; default affine. Needs --quantize.")
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Type of unquantised weights; default: the base's.")] = None,
    key_map: Annotated[Path | None, typer.Option(help="JSON file that renames unknown tensors.")] = None,
    ignore_keys: Annotated[
        str | None,
        typer.Option(metavar="REGEX", callback=regular_expression, help="Drop tensors whose whole name matches."),
    ] = None,
    recompute_init: Annotated[
        bool, typer.Option("--recompute-init", help="Recompute what PiSSA or OLoRA took out of the base.")
    ] = False,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Turn a quantised base into a float one, to merge into it.")
    ] = False,
    lora_only: Annotated[bool, typer.Option("--lora-only", help="Convert a plain LoRA fine-tune, no streams.")] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Also read tensors from .bin and .pt files; needs PyTorch >= 2.10."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Refused here: a conversion never runs code of a checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would become of every tensor; write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload the output and compare it with the reference.")
    ] = True,
    reference_logits: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Logits recorded in PyTorch to compare with.")
    ] = None,
    upload_repo: Annotated[
        str | None, typer.Option(callback=repo_id, help="Hugging Face repository to upload the output to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the conversion report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No summary and no progress on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Convert a PyTorch fine-tune (PEFT LoRA and streams) to an MLX model directory."""
    needs_quantize = {"--q-bits": q_bits, "--q-group-size": q_group_size, "--q-mode": q_mode}
    for option, value in needs_quantize.items():
        if value is not None and not quantize:
            raise UsageError(f"{option}: has no effect without --quantize; add -q or drop it")
    if adapter_path is None and streams_path is None:
        raise UsageError("nothing to convert: give --adapter-path (a PEFT directory) or --streams-path")
    if dry_run and upload_repo is not None:
        raise UsageError("--upload-repo: nothing is uploaded with --dry-run; drop one")
    if hf_path is not None:
        is_repo_id(hf_path, "--hf-path", revision)
    quieten_libraries(offline=False, debug=debug)
    with answer() as out, terminated_like_interrupted():
        import specstream_convert as converter

        options = converter.ConvertOptions(
            adapter_path=adapter_path,
            mlx_path=mlx_path,
            hf_path=hf_path,
            adapter_name=adapter_name,
            streams_path=streams_path,
            specstream_config=specstream_config,
            fuse=fuse,
            adapter_only=adapter_only,
            quantize=quantize,
            q_bits=4 if q_bits is None else q_bits,
            q_group_size=64 if q_group_size is None else q_group_size,
            q_mode=q_mode or "affine",
            dtype=dtype,
            key_map=key_map,
            ignore_keys=ignore_keys,
            lora_only=lora_only,
            overwrite=overwrite,
            dry_run=dry_run,
            verify=verify,
            reference_logits=reference_logits,
            allow_pickle=allow_pickle,
            recompute_init=recompute_init,
            dequantize=dequantize,
            upload_repo=upload_repo,
            trust_remote_code=trust_remote_code,
            **place_of(revision, False),
        )
        with progress_bar(quiet=quiet, in_bytes=True) as progress:
            report = converter.convert(options, progress).to_dict()
        if as_json:
            out.write_json(report)
        elif dry_run:
            out.write(plan(report))
    if not quiet:
        for line in summary(report, mlx_path):
            to_stderr(line)


def plan(report: Mapping[str, Any]) -> str:
    """The fate of every input tensor as a table."""
    rows = [(f"{row['file']}:{row['tensor']}", row["fate"], row["target"] or "-") for row in report["tensors"]]
    return table(("input tensor", "fate", "output tensor"), rows)


def summary(report: Mapping[str, Any], mlx_path: Path) -> list[str]:
    """What happened, for people."""
    fates = Counter(re.split(r"[ (:;,]", row["fate"], maxsplit=1)[0] for row in report["tensors"])
    files = report["output_files"]
    verb = "would write" if report["dry_run"] else "wrote"
    lines = [f"{verb} {mlx_path} ({len(files)} files, {report['mode'] or 'no streams'}, LoRA {report['placement']})"]
    lines.append(f"{sum(fates.values())} tensors: " + ", ".join(f"{n} {fate}" for fate, n in sorted(fates.items())))
    if report["verification"] is not None:
        lines += [f"verified {name}: {_figures(found)}" for name, found in report["verification"].items()]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return lines


def _figures(found: Any) -> str:
    """``{"checked": 39, "max_abs_error": 3.62e-08}`` -> ``checked 39, max abs error 3.6e-08``."""
    if not isinstance(found, Mapping):
        return str(found)
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.2g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in found.items()
    )
