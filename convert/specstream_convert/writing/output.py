"""The output directory: where it may be, whose tokenizer it gets, what its README says.

Only an earlier output of this converter is replaced.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from specstream_convert.report import REPORT_NAME, TOOL
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.families import FAMILIES
from specstream_mlx.formats.card import card, generate_lines
from specstream_mlx.formats.config import StreamConfig, read_json
from specstream_mlx.formats.messages import escaped


def check_place(target: Path, inputs: Iterable[Path]) -> None:
    """Refuse a target in an input or around one.

    Raises:
        UsageError: it is no place for an output.
        InvalidInputError: a name that MLX cannot open.
    """
    inputs = [path.resolve() for path in inputs]
    if not target.name or target.name == "..":
        raise UsageError(f"{target}: not a name for an output directory; choose another --mlx-path")
    for path in (target, *inputs):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            name = escaped(str(path))
            raise InvalidInputError(f"{name}: the name is not UTF-8, and MLX cannot open it; rename it") from None
    resolved = target.resolve()
    for path in inputs:
        home = path if path.is_dir() else path.parent
        if resolved == home or home in resolved.parents:
            raise UsageError(f"{target}: lies in the input {home}; choose another --mlx-path")
        if resolved in home.parents:
            raise UsageError(f"{target}: the input {home} lies in it; choose another --mlx-path")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier output of this converter.

    Raises:
        UsageError: something else is there, or ``overwrite`` was not given.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{target}: already exists; choose another --mlx-path or give --overwrite")
    foreign = not_ours(target)
    if foreign:
        raise UsageError(f"{target}: {foreign}; --overwrite replaces only an earlier output of this converter")


def not_ours(target: Path) -> str | None:
    """Why ``target`` may not be replaced, or None when it is an output of this converter and nothing else."""
    if target.is_symlink() or not target.is_dir():
        return "not a directory"
    try:
        report = read_json(target / REPORT_NAME)
    except InvalidInputError:
        return f"has no readable {REPORT_NAME}"
    files = report.get("output_files")
    if report.get("tool") != TOOL or not isinstance(files, dict):
        return f"its {REPORT_NAME} is not this converter's"
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    foreign = sorted(present - set(files) - {REPORT_NAME})
    if foreign:
        return f"holds {escaped(foreign[0])}, which this converter did not write"
    return None


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_directory(adapter: Path | None, base: Path) -> Path | None:
    """Where the tokenizer is taken from: the adapter's when it is complete, otherwise the base's."""
    for directory in (adapter, base):
        if directory is not None and any(
            (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
        ):
            return directory
    return None


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that has ids beyond the rows of the embedding."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    raw = read_json(path)
    model, added = raw.get("model"), raw.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [i for i in vocabulary.values() if type(i) is int] if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [entry["id"] for entry in added if isinstance(entry, dict) and type(entry.get("id")) is int]
    if ids and max(ids) >= vocab_size:
        raise InvalidInputError(
            f"{path}: has token id {max(ids)}, but the embedding has {vocab_size} rows; the vocabulary was resized "
            "and its rows were not saved; save the adapter again with save_embedding_layers=True, or merge it in PEFT "
            "and give that directory as --hf-path"
        )


def model_card(
    base_name: str,
    model_type: str,
    config: StreamConfig | None,
    placement: str,
    adapter_only: bool,
    remarks: Sequence[str] = (),
) -> str:
    """README.md of the output; ``remarks`` are sentences on how the base was treated."""
    base_name = escaped(base_name)
    usage = [*remarks, ""] if remarks else []
    usage += generate_lines(base_name if adapter_only else None)
    if not adapter_only and FAMILIES[model_type].MODEL is not None:
        usage += ["", f"mlx-lm itself has no `{model_type}` and does not open it."]
    elif not adapter_only:
        adapters = ', adapter_path="adapters"' if placement == "live" else ""
        usage += ["", "Stock mlx-lm opens it without drafting:", "", "```python", "from mlx_lm import load", ""]
        usage += [f'model, tokenizer = load("."{adapters})', "```"]
    title = f"{base_name} with speculative streams" if config else f"{base_name}, fine-tuned"
    end = f"What became of every tensor is in `{REPORT_NAME}`."
    return card(title, base_name, config, placement, "converted by", usage, end)
