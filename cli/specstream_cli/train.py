"""``specstream-mlx train``: streams (and LoRA) for a model, on this machine."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from specstream_cli.chat_template import chat_template, is_used
from specstream_cli.signals import terminated_like_interrupted
from specstream_cli.terminal import Progress, answer, is_terminal, progress_bar, quieten_libraries, to_stderr
from specstream_cli.train_config import FEATURES, read_config, refuse_flags
from specstream_cli.validation import any_repo_id, repo_id, within
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.options import Mode, Optimizer, StreamPosition

_WRITTEN = (
    "README.md",
    "adapters",
    "specstream.safetensors",
    "specstream_config.json",
    "training.png",
    "training_log.jsonl",
    ".DS_Store",
)
"""What an output of this command may hold."""


class TrainCommand(TyperCommand):
    """The command with a word for those who type the flags of ``mlx_lm lora`` by habit."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse those that are none here, then parse."""
        refuse_flags(args)
        return super().parse_args(ctx, args)


def train(
    model: Annotated[
        str | None, typer.Option(help="MLX model directory or repository; default: the model shipped here.")
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Branch, tag or commit of the model's repository."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Directory with train.jsonl (and valid.jsonl), JSONL file, or Hugging Face data set."),
    ] = None,
    self_distill: Annotated[
        bool | None,
        typer.Option("--self-distill", help="Train on the model's own answers; lossless mode, needs no --data."),
    ] = None,
    adapter_path: Annotated[
        str | None, typer.Option(help="Directory to write, for generate --adapter; default: stream_adapter.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output, and discard restart points.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with these options, as in mlx_lm lora.")
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="lossless: the answers stay the base's (default). shared: LoRA fine-tunes the answers too."),
    ] = None,
    gamma: Annotated[int | None, typer.Option(help="Number of streams; default 4.")] = None,
    num_stream_layers: Annotated[
        int | None, typer.Option(help="Top layers that run streams; default: a quarter of them, 2 to 8.")
    ] = None,
    stream_init_rank: Annotated[
        int | None, typer.Option(help="Rank of the map a stream starts with; default: the identity.")
    ] = None,
    value_rotation: Annotated[
        float | None, typer.Option(metavar="EPSILON", help="Tell streams apart by turned values, not embeddings.")
    ] = None,
    stream_position: Annotated[
        StreamPosition | None, typer.Option(help="Rotary position of a stream; default anchor_plus_j.")
    ] = None,
    prune_rank: Annotated[
        int | None, typer.Option(help="Also train the early-exit pruner, of this rank (the paper: 8).")
    ] = None,
    pruner_only: Annotated[
        bool | None,
        typer.Option("--pruner-only", help="Train the pruner alone, on the streams of --resume-adapter-file."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank; default 32.")] = None,
    scale: Annotated[float | None, typer.Option(help="LoRA scale; default 2.")] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Shared mode: LoRA in so many layers from the top; default -1, all.")
    ] = None,
    iters: Annotated[int | None, typer.Option(help="Iterations; default 1000.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per iteration; default 4.")] = None,
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(help="Iterations per optimizer update; default 1.")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Optimizer; default adamw.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of LoRA's; falls linearly; default 5e-4 at a hidden size of 2048.")
    ] = None,
    stream_lr_scale: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the stream tensors, times LoRA's; default: what the hidden states ask for."
        ),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Updates until the peak; default 0.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Largest norm of a gradient; default 1.")] = None,
    stream_weight: Annotated[float | None, typer.Option(help="Weight of each stream's loss; default 0.1.")] = None,
    prune_weight: Annotated[float | None, typer.Option(help="Weight of the pruner's loss; default 1.")] = None,
    latent_weight: Annotated[
        float | None, typer.Option(help="Weight of the latent consistency; default 0, off.")
    ] = None,
    mask_prompt: Annotated[
        bool | None,
        typer.Option("--mask-prompt/--no-mask-prompt", help="Leave prompts out of the loss; default: where there are."),
    ] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Longer rows are cut; default 2048.")] = None,
    max_anchors: Annotated[
        int | None, typer.Option(help="Random anchors per sequence and iteration; default: all.")
    ] = None,
    rows_per_chunk: Annotated[
        int | None, typer.Option(help="Stream rows that pass at once; less needs less memory; default 1024.")
    ] = None,
    grad_checkpoint: Annotated[
        bool | None, typer.Option("--grad-checkpoint", help="Compute twice instead of keeping; needs less memory.")
    ] = None,
    val_batches: Annotated[
        int | None, typer.Option(help="Validation batches, -1 for all, 0 for none and no row held out; default 25.")
    ] = None,
    steps_per_report: Annotated[int | None, typer.Option(help="Iterations between reports; default 10.")] = None,
    steps_per_eval: Annotated[int | None, typer.Option(help="Iterations between validations; default 200.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Iterations between restart points; default 100.")] = None,
    seed: Annotated[
        int | None, typer.Option(callback=within(0, 2**31), help="Of everything random; default 0.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest restart point of an interrupted run.")
    ] = False,
    resume_adapter_file: Annotated[
        str | None,
        typer.Option(help="Start from the tensors of this stream adapter; its settings and modules are the defaults."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts to answer: text, one a line, or JSONL; default: the model's prompts.jsonl, or a general list."
        ),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="File that keeps the answers; default: beside --adapter-path.")
    ] = None,
    chat_template_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="Further arguments of the chat template of the prompts.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Sampled answers beside each greedy one; default 1.")] = None,
    temp: Annotated[float | None, typer.Option(help="Temperature of the sampled answers; default 0.8.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; default 256.")] = None,
    export_peft: Annotated[
        Path | None, typer.Option(help="Also write the PyTorch form, for PEFT and convert, to this directory.")
    ] = None,
    upload_repo: Annotated[
        str | None, typer.Option(callback=repo_id, help="Hugging Face repository to upload the adapter to.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let the model run code from its repository.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary on standard error.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> None:
    """Train streams for a model, so that it drafts its own text."""
    options = locals().copy()
    types = _types_in_file()
    given = {name: options[name] for name in types if options[name] is not None}
    notes: list[str] = []
    if config is not None:
        in_file, notes = read_config(config.expanduser(), types)
        if "data" in given:  # comes before what a file says of data
            in_file.pop("hf_dataset", None)
        both = in_file | given
        default = None if "resume_adapter_file" in both else "lossless"  # else the adapter's own
        if "num_layers" in in_file and both.get("mode", default) == "lossless":
            del in_file["num_layers"]
            notes.append(f"{config}: num_layers has no effect in lossless mode, where LoRA acts in the stream layers")
        given = in_file | given
    for name, value in given.items():
        if value == "" and name != "model":
            raise UsageError(f"--{name.replace('_', '-')}: empty; give a value or drop it")
    begin = time.perf_counter()
    chosen = str(given["model"]) if "model" in given else None
    at = str(given["revision"]) if "revision" in given else None
    remote = any_repo_id({"--model": chosen}, at)
    remote = remote or upload_repo is not None
    for place in [one["path"] for one in given.get("hf_dataset", ())] or [given.get("data", ".")]:
        remote = remote or not Path(place).expanduser().exists()
    _check_sources(given)
    output = Path(given.get("adapter_path", "stream_adapter")).expanduser()
    quieten_libraries(offline=not remote, debug=debug)
    _check_outputs(output, export_peft, given, resume=resume, overwrite=overwrite)
    with answer() as out, terminated_like_interrupted():
        from specstream_mlx.formats.upload import check_upload
        from specstream_mlx.training.datasets import local_files
        from specstream_mlx.training.distill import DistillSettings
        from specstream_mlx.training.run import TrainRun

        if upload_repo is not None:
            check_upload(upload_repo)
        DistillSettings(**_of_answers(given))
        if "data" in given and not given.get("self_distill", False):
            local_files(given["data"])
        run = TrainRun.prepare(
            chosen,
            output,
            {key: value for key, value in given.items() if key in TrainRun.SETTINGS},
            adapter=_adapter_directory(given.get("resume_adapter_file")),
            revision=at,
            trust_remote_code=given.get("trust_remote_code", False),
            check_peft=export_peft is not None,
        )
        say = (lambda line: None) if quiet else to_stderr
        for note in notes:
            say(f"note: {note}")
        with progress_bar(quiet=quiet) as progress:
            examples = _examples(run, given, output, progress, say)
            validated = f"{len(examples.valid):,}" if examples.valid else "none"
            say(f"{run.summary()}; {len(examples.train):,} rows to train on, {validated} to validate on")
            if overwrite and not resume:
                run.discard_restart_points()
            try:
                found = run.train(
                    examples,
                    resume=resume,
                    report=None if quiet else _reporter(run.settings.iters),
                    progress=progress,
                )
            except KeyboardInterrupt:
                if any(_checkpoints(output).glob("step-*")):
                    say(f"the training so far is in {_checkpoints(output)}; the same command with --resume goes on")
                raise
        if export_peft is not None:
            run.export_peft(export_peft.expanduser())
        if upload_repo is not None:
            run.upload(upload_repo)
        result = run.result(found) | {"seconds": round(time.perf_counter() - begin, 1)}
        if as_json:
            out.write_json(result)
    for line in _summary(result, output, export_peft, upload_repo):
        say(line)


def _types_in_file() -> dict[str, type]:
    """The options that a ``--config`` file may give too: those without a default here, with the type of their value."""
    found = {}
    for name, hint in get_type_hints(train).items():
        kind = get_args(hint)[0] if type(None) in get_args(hint) else None
        if name not in ("config", "export_peft", "upload_repo", "return") and kind is not None:
            found[name] = kind if isinstance(kind, type) else str
    return found


def _prompts(given: Mapping[str, Any]) -> Path | None:
    """Where the prompts to answer were said to be."""
    source = given.get("prompts", given.get("data"))
    return None if source is None else Path(source).expanduser()


def _of_answers(given: Mapping[str, Any]) -> dict[str, Any]:
    """How the model is to answer, for ``DistillSettings``."""
    return {key: given[key] for key in ("samples", "temp", "max_tokens") if key in given}


def _check_sources(given: Mapping[str, Any]) -> None:
    distill = given.get("self_distill", False)
    chat_template(None, given.get("chat_template_config"))
    if distill and "hf_dataset" in given:
        raise UsageError("hf_dataset: --self-distill takes prompts from a file; give --prompts, or drop one")
    if not distill and "data" not in given and "hf_dataset" not in given:
        raise UsageError("nothing to train on: give --data, or --self-distill to train on the model's own answers")
    if distill and given.get("mode", "lossless") != "lossless":
        raise UsageError("--self-distill: goes with --mode lossless; shared mode trains new answers, give --data")
    if distill and "data" in given and "prompts" in given:
        raise UsageError("--prompts: --data gives the prompts already; drop one")
    prompts = _prompts(given)
    if distill and prompts is not None and not prompts.exists():
        flag = "prompts" if "prompts" in given else "data"
        raise InvalidInputError(f"--{flag}: {given[flag]}: no such file or directory")
    if not distill:
        for name in ("prompts", "answers", "chat_template_config", "samples", "temp", "max_tokens"):
            if name in given:
                raise UsageError(f"--{name.replace('_', '-')}: has no effect without --self-distill; add it or drop it")


def _check_outputs(
    output: Path, export_peft: Path | None, given: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Refuse, before hours of work, what could not be written or would be lost; an output that a kill hid returns."""
    from specstream_mlx.formats.atomic import recover

    if not output.name or output.name == "..":
        raise UsageError(f"--adapter-path: {output} is not a name for a directory")
    checkpoints = _checkpoints(output)
    for flag, place in (("--adapter-path", output), ("--export-peft", export_peft)):
        if place is not None:
            _check_writable(flag, place.expanduser())
            recover(place.expanduser())
    if output.is_symlink():
        raise UsageError(f"--adapter-path: {output} is a symbolic link; give the place it points to")
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UsageError(f"{checkpoints}: no directory, and restart points go there; choose another --adapter-path")
    if given.get("self_distill", False):
        _check_answers(Path(given.get("answers", _answers(output))).expanduser())
    for flag, value in (("--answers", given.get("answers")), ("--export-peft", export_peft)):
        if value is not None and _within(Path(value), output, checkpoints):
            raise UsageError(f"{flag}: {value} lies where --adapter-path {output} is written; choose another place")
    start = given.get("resume_adapter_file")
    if overwrite and start is not None and _within(Path(start), checkpoints):
        raise UsageError(
            f"--overwrite: discards the restart points in {checkpoints}, and --resume-adapter-file is one; choose "
            "another --adapter-path"
        )
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: already exists; choose another --adapter-path or give --overwrite")
    if output.exists() and not (output.is_dir() and (output / "training_log.jsonl").is_file()):
        raise UsageError(
            f"{output}: --overwrite replaces only an earlier output of train; choose another --adapter-path"
        )
    others = sorted(path.name for path in output.iterdir() if path.name not in _WRITTEN) if output.exists() else []
    if others:
        raise UsageError(
            f"{output}: holds what train did not write ({', '.join(others[:5])}), which --overwrite would delete; "
            "move it away, or choose another --adapter-path"
        )
    if any(checkpoints.glob("step-*")) and not (resume or overwrite):
        raise UsageError(f"{checkpoints}: an interrupted run is there; --resume goes on, --overwrite starts again")
    if export_peft is not None and os.path.lexists(export_peft.expanduser()):
        raise UsageError(f"{export_peft}: already exists; choose another --export-peft")


def _check_writable(flag: str, path: Path) -> None:
    """Find out by making a directory there: permissions do not tell of a system mounted for reading."""
    try:
        parent = next(one for one in path.absolute().parents if one.exists())
        if not parent.is_dir():
            raise UsageError(f"{flag}: {path} cannot be made, {parent} is no directory; choose another place")
        with contextlib.suppress(FileNotFoundError):
            _checkpoints(path).lstat()  # the longest of the names
        Path(tempfile.mkdtemp(prefix=".specstream-", dir=parent)).rmdir()
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag}: {path} cannot be made ({reason}); choose another place") from error


def _check_answers(file: Path) -> None:
    if not file.exists():
        _check_writable("--answers", file)
    elif not file.is_file() or not os.access(file, os.R_OK | os.W_OK):
        reason = "may not be read and written" if file.is_file() else "is no file"
        raise UsageError(f"--answers: {file} {reason}; choose another place")


def _answers(output: Path) -> Path:
    return output.with_name(output.name + ".answers.jsonl")


def _checkpoints(output: Path) -> Path:
    return output.with_name(output.name + ".checkpoints")


def _within(path: Path, *directories: Path) -> bool:
    real = path.expanduser().resolve()
    return any(real.is_relative_to(directory.resolve()) for directory in directories)


def _adapter_directory(name: str | None) -> Path | None:
    """The directory of ``--resume-adapter-file``, which may also be a file in it."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"--resume-adapter-file: {name}: no such directory; give a stream adapter that train wrote")
    return path if path.is_dir() else path.parent


def _examples(
    run: Any, given: Mapping[str, Any], output: Path, progress: Progress | None, say: Callable[[str], None]
) -> Any:
    if given.get("self_distill", False):
        from specstream_mlx.training.distill import default_prompts

        file = Path(given.get("answers", _answers(output))).expanduser()
        prompts = _prompts(given) or default_prompts(run.path)
        chat = chat_template(None, given.get("chat_template_config"))
        is_used(chat, run.tokenizer)
        begin = time.perf_counter()
        try:
            found = run.own_answers(
                prompts,
                file,
                _of_answers(given),
                None if progress is None else lambda done, total: progress("answers", done, total),
                chat.arguments,
            )
        except KeyboardInterrupt:
            if file.exists():
                say(f"the answers so far are in {file}; the same command goes on")
            raise
        tokens = sum(len(example.answer) for example in [*found.train, *found.valid])
        seconds = time.perf_counter() - begin
        say(f"own answers to {prompts or 'general prompts'}: {tokens:,} tokens in {seconds:.0f} s, kept in {file}")
    else:
        features = {name: given[name] for name in FEATURES if name in given}
        found = run.read(given.get("hf_dataset") or given["data"], given.get("mask_prompt"), features)
    for note in (*found.notes, run.check_rows(found)):
        if note is not None:
            say(f"note: {note}")
    return found


def _reporter(iters: int) -> Callable[[dict[str, Any]], None]:
    def report(event: dict[str, Any]) -> None:
        line = event_line(event, iters)
        if line is not None:
            to_stderr(line)

    return report


def event_line(event: Mapping[str, Any], iters: int) -> str | None:
    """An event of the log for people; None for those that only the log needs."""
    if event["event"] == "interrupted":
        return "stopping after this step, and saving it; interrupt again to stop at once"
    where = f"iter {event['iteration']}/{iters}"
    if event["event"] == "start":
        return f"stream embeddings learn {event['stream_lr_scale']:.3g} times as fast as LoRA"
    if event["event"] == "train":
        extra = "".join(
            f"  {name} {event[f'{name}_loss']:.3f}" for name in ("main", "prune", "latent") if f"{name}_loss" in event
        )
        loss = "nan" if event["loss"] is None else f"{event['loss']:.4f}"
        rates = " ".join(f"{rate:.3f}" for rate in event["agreement"])
        return (
            f"{where}  loss {loss}{extra}  right by depth {rates or '-'}  lr {event['learning_rate']:.2e}  "
            f"{event['tokens_per_second']:.0f} tok/s  peak {event['peak_memory_gb']:.2f} GB"
        )
    if event["event"] == "validation":
        rates = " ".join(f"{rate:.3f}" for rate in event["acceptance"])
        return (
            f"{where}  validation: loss {event['loss']:.4f}  acceptance by depth {rates}  "
            f"tokens per pass {event['tokens_per_pass']:.3f}"
        )
    return None if is_terminal() else f"{where}  saved {event['path']}"


def _summary(result: Mapping[str, Any], output: Path, export_peft: Path | None, upload_repo: str | None) -> list[str]:
    lines = [
        f"wrote {output}: {result['adapter_bytes']:,} bytes, {result['trained_parameters']:,} trained parameters, "
        f"{result['seconds']:.0f} s, peak {result['peak_memory_gb']:.2f} GB"
    ]
    if export_peft is not None:
        lines.append(f"wrote {export_peft} (PEFT form)")
    if upload_repo is not None:
        lines.append(f"uploaded {output} to {upload_repo}")
    if not result["plot"]:
        lines.append("no plot: matplotlib is not installed; the figures are in training_log.jsonl")
    lines.append(f'try: specstream-mlx generate --model {result["model"]} --adapter {output} --prompt "..."')
    return lines
