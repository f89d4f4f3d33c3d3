"""The output directory: written beside its target, renamed into place when complete, removed when not.

A reader of the target sees nothing or a complete directory. Only an earlier output of this converter is replaced.
What a killed run leaves behind is cleared by the next one with the same target (``specstream_mlx.formats.atomic``).
"""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from specstream_convert.report import REPORT_NAME, TOOL
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.families import FAMILIES
from specstream_mlx.formats.atomic import PARTIAL, create_locked, hidden_name, recover, swap, sync, sync_tree
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import escaped


class OutputDirectory:
    """A context whose value is the temporary directory; :meth:`commit` puts it in the target's place."""

    def __init__(self, target: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
        self.target = Path(target).expanduser()
        self.path = self.target
        self._overwrite = overwrite
        self._replace = False
        self._lock: int | None = None
        self._made: list[Path] = []
        self._check_place([path.resolve() for path in inputs])
        self._check_target()

    def _check_place(self, inputs: list[Path]) -> None:
        target = self.target
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

    def _check_target(self) -> None:
        target = self.target
        self._replace = target.exists() or target.is_symlink()
        if not self._replace:
            return
        if not self._overwrite:
            raise UsageError(f"{target}: already exists; choose another --mlx-path or give --overwrite")
        foreign = not_ours(target)
        if foreign:
            raise UsageError(f"{target}: {foreign}; --overwrite replaces only an earlier output of this converter")

    def __enter__(self) -> Path:
        try:
            recover(self.target)
            self._check_target()
            for parent in reversed([p for p in self.target.parents if not p.exists()]):
                parent.mkdir()
                self._made.append(parent)
            self._create()
        except OSError as error:
            self._remove()
            raise UsageError(
                f"{self.target}: cannot be created ({error.strerror}); choose another --mlx-path"
            ) from error
        except BaseException:
            self._remove()
            raise
        return self.path

    def _create(self) -> None:
        while True:
            self.path = hidden_name(self.target, PARTIAL)
            with contextlib.suppress(BlockingIOError):
                self._lock = create_locked(self.path)
                return

    def commit(self) -> None:
        """Put the complete directory in place; an output to be replaced goes away only after that."""
        try:
            sync_tree(self.path)  # or a power cut could leave a directory of empty files under the final name
            self._check_target()
            if self._replace:
                swap(self.path, self.target)
            else:
                self.path.rename(self.target)
            for parent in (self.target.parent, *(made.parent for made in self._made)):
                sync(parent)
        except OSError as error:
            raise UsageError(f"{self.target}: cannot be written ({error.strerror})") from error
        self._made = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        """Delete what is at the temporary name (after a swap, the old output) and the parents made for nothing."""
        if self.path != self.target:
            try:
                shutil.rmtree(self.path, ignore_errors=True)
            except KeyboardInterrupt:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:
                return


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON the same way every time."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:  # JSON may say 1e999, which is read as infinity
        raise InvalidInputError(
            f"{path.name}: would hold a number that is not finite, as a configuration of the input does; correct it"
        ) from error
    path.write_bytes(text.encode("utf-8", "backslashreplace"))  # a name that is no UTF-8 becomes a JSON escape


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
    *,
    base_name: str,
    model_type: str,
    mode: str | None,
    placement: str,
    gamma: int | None,
    adapter_only: bool,
    remarks: Sequence[str] = (),
) -> str:
    """README.md of the output; ``remarks`` are sentences on how the base was treated."""
    base_name = escaped(base_name)
    front = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    if gamma is not None:
        front.append("- speculative-decoding")
    if "/" in base_name:
        front.append(f"base_model: {base_name}")
    front.append("---")
    lines = ["", f"# {base_name} with speculative streams" if gamma else f"# {base_name}, fine-tuned", ""]
    if gamma is not None:
        lines += [
            f"Converted by specstream-mlx: {gamma} speculative streams (Speculative Streaming, arXiv 2402.11131), "
            f"mode `{mode}`.",
            "",
        ]
    if mode == "lossless":
        lines += ["The answers are those of the base model; the LoRA acts on the draft streams only.", ""]
    elif placement == "live":
        lines += ["The fine-tune is a live LoRA in `adapters/`, in mlx-lm's format.", ""]
    elif placement == "merged":
        lines += ["The fine-tune's LoRA is merged into the weights.", ""]
    if remarks:
        lines += [*remarks, ""]
    lines += ["```bash", "pip install specstream-mlx"]
    if adapter_only:
        lines += [f'specstream-mlx generate --model {shlex.quote(base_name)} --adapter . --prompt "..."', "```"]
    else:
        lines += ['specstream-mlx generate --model . --prompt "..."', "```"]
        if FAMILIES[model_type].MODEL is not None:
            lines += ["", f"mlx-lm itself has no `{model_type}` and does not open it."]
        else:
            adapters = ', adapter_path="adapters"' if placement == "live" else ""
            lines += ["", "Stock mlx-lm opens it without drafting:", "", "```python", "from mlx_lm import load", ""]
            lines += [f'model, tokenizer = load("."{adapters})', "```"]
    lines += ["", f"What became of every tensor is in `{REPORT_NAME}`.", ""]
    return "\n".join(front + lines)
