"""The stream tensors of a checkpoint, from either form, under the names of the contract and checked against it.

Form A keeps them in the adapter file (PEFT's ``modules_to_save``), form B in ``specstream.safetensors`` beside it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from specstream_convert.adapter.peft_keys import Kind, parse
from specstream_convert.files.stored import StoredTensor
from specstream_convert.report import TensorFate
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.formats.config import CONFIG_NAME, PREFIX, REQUIRED, StreamConfig, read_json
from specstream_mlx.formats.messages import at, escaped, refuse
from specstream_mlx.formats.safetensors import TensorFile

WHY_NO_STREAMS = (
    "no specstream.* tensor was saved. Known causes: the module was attached after get_peft_model, its tensors are "
    "bare parameters named in modules_to_save, or modules_to_save=['specstream'] was forgotten; retrain, or convert "
    "the plain adapter with --lora-only"
)
_ALIASES = (
    (re.compile(r"^stream_embeddings\.weight$"), "stream_embeddings"),
    (re.compile(r"^(?:stream_init|f_eta)\.(?:down|0)\.weight$"), "stream_init.down.weight"),
    (re.compile(r"^(?:stream_init|f_eta)\.(?:up|1)\.weight$"), "stream_init.up.weight"),
    (re.compile(r"^(?:prune|f_rho|o_theta)\.(?:down|0)\.weight$"), "prune.down.weight"),
    (re.compile(r"^(?:prune|f_rho|o_theta)\.(?:up|1)\.weight$"), "prune.up.weight"),
)
TRANSPOSED = ".T"  # behind a name in the key map
_ROW = re.compile(r"^stream_embeddings\.(\d{1,3})$")


@dataclass(frozen=True)
class Source:
    """The rows of one stream tensor: one stored tensor, or one per stream (a ParameterList)."""

    rows: tuple[StoredTensor, ...]

    @property
    def place(self) -> str:
        """``file:tensor`` of the first, for messages."""
        return self.rows[0].place

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape once read; a singleton dimension of the embeddings' three is squeezed by :func:`read`."""
        first = self.rows[0].shape
        if len(self.rows) > 1 or len(first) == 1:
            return (len(self.rows), first[-1] if first else 1)
        if len(first) == 3 and 1 in first[:2]:
            return (first[0] * first[1], first[2])
        return first

    def read(self) -> mx.array:
        """The tensor in float32."""
        rows = [row.read_float32() for row in self.rows]
        joined = rows[0] if len(rows) == 1 else mx.concatenate([row.reshape(1, -1) for row in rows])
        return joined.reshape(self.shape)


@dataclass(frozen=True)
class StreamSource:
    """All stream tensors found, by the contract's name without the prefix."""

    tensors: dict[str, Source]
    fates: tuple[TensorFate, ...]
    notes: tuple[str, ...]


def gather(found: Mapping[str, StoredTensor]) -> StreamSource:
    """Resolve aliases among ``found``, tensors by their name below ``specstream.``."""
    problems: list[str] = []
    notes: list[str] = []
    rows: dict[int, StoredTensor] = {}
    names: dict[str, StoredTensor] = {}
    for inner, tensor in found.items():
        turned = inner.endswith(TRANSPOSED) and not tensor.raw.endswith(TRANSPOSED)  # so the key map wrote it
        if turned:
            inner = inner.removesuffix(TRANSPOSED)
            problems += _turning_problems(tensor)
            tensor = replace(tensor, transposed=True)
        row = None if turned else _ROW.match(inner)
        if row:
            rows[int(row.group(1))] = tensor
            continue
        canonical = next((name for pattern, name in _ALIASES if pattern.match(inner)), inner)
        if canonical in names:
            problems.append(f"{tensor.place}: means the same tensor as {escaped(names[canonical].raw)}; keep one")
        if canonical != inner or turned:
            how = ", transposed" if turned else ""
            notes.append(f"{tensor.file.path.name}: {escaped(tensor.raw)} read as {PREFIX}{canonical}{how}")
        names[canonical] = tensor
    tensors = {name: Source((tensor,)) for name, tensor in names.items()}
    if rows:
        problems += _row_problems(rows, names)
        tensors["stream_embeddings"] = Source(tuple(rows[i] for i in sorted(rows)))
        notes.append(
            f"{next(iter(rows.values())).file.path.name}: {len(rows)} rows of specstream.stream_embeddings joined"
        )
    refuse(problems)
    embeddings = tensors.get("stream_embeddings")
    if embeddings and len(embeddings.rows[0].shape) == 3:
        notes.append(
            f"{embeddings.rows[0].file.path.name}: a dimension of size 1 removed from specstream.stream_embeddings"
        )
    return StreamSource(
        tensors,
        tuple(
            row.fate("copied", f"specstream.safetensors:{PREFIX}{name}")
            for name, source in tensors.items()
            for row in source.rows
        ),
        tuple(notes),
    )


def _turning_problems(tensor: StoredTensor) -> list[str]:
    shape = tensor.shape
    if len(shape) != 2:
        return [f"{tensor.place}: shape {shape}, only a matrix can be transposed; correct the key map"]
    if shape[0] == shape[1]:
        return [
            f"{tensor.place}: has as many rows as columns, so nothing shows that it is transposed; "
            "save it the right way round"
        ]
    return []


def _row_problems(rows: dict[int, StoredTensor], names: dict[str, StoredTensor]) -> list[str]:
    problems = []
    path = next(iter(rows.values())).file.path
    if sorted(rows) != list(range(len(rows))):
        problems.append(
            f"{path}: rows of stream_embeddings are {sorted(rows)}, expected 0 to {len(rows) - 1}; save them all"
        )
    if "stream_embeddings" in names:
        problems.append(f"{names['stream_embeddings'].place}: given whole and row by row; keep one")
    sizes = {row.shape for row in rows.values()}
    if len(sizes) > 1 or any(len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1) for shape in sizes):
        problems.append(f"{path}: rows of stream_embeddings have shapes {sorted(sizes)}, expected one (D,)")
    return problems


def from_stream_file(file: TensorFile, renames: Mapping[str, str], ignored: re.Pattern[str] | None) -> StreamSource:
    """Form B: every tensor of the file must be a stream tensor."""
    found: dict[str, StoredTensor] = {}
    problems = []
    fates = []
    for raw in file.tensors:
        if ignored is not None and ignored.fullmatch(raw):
            fates.append(TensorFate(file.path.name, raw, "ignored by --ignore-keys"))
            continue
        key = parse(renames.get(raw, raw))
        if key.kind is not Kind.STREAM:
            problems.append(f"{at(file.path, raw)}: not a stream tensor; map it with --key-map or --ignore-keys it")
        elif key.module in found:
            problems.append(
                f"{at(file.path, raw)}: means the same tensor as {escaped(found[key.module].raw)}; keep one"
            )
        else:
            found[key.module] = StoredTensor(file, raw)
    refuse(problems)
    source = gather(found)
    return StreamSource(source.tensors, tuple(fates) + source.fates, source.notes)


def join(form_a: StreamSource | None, form_b: StreamSource | None) -> StreamSource:
    """One source; both forms at once only when they hold the same bits."""
    if form_a is None or not form_a.tensors:
        return form_b or form_a or StreamSource({}, (), ())
    if form_b is None:
        return form_a
    problems = []
    for name in sorted(set(form_a.tensors) | set(form_b.tensors)):
        a, b = form_a.tensors.get(name), form_b.tensors.get(name)
        if a is None or b is None:
            held = a or b
            assert held is not None
            problems.append(
                f"{held.rows[0].file.path}: {PREFIX}{escaped(name)} is only there, not in the other form; "
                "remove the wrong one"
            )
        elif a.shape != b.shape or not bool(mx.array_equal(a.read(), b.read()).item()):
            problems.append(f"{a.place}: differs from {b.place}; remove the one that is wrong")
    refuse(problems)
    note = "the adapter file and the stream file hold the same stream tensors"
    return StreamSource(form_a.tensors, form_a.fates + form_b.fates, (*form_a.notes, *form_b.notes, note))


def read_stream_config(path: Path, source: StreamSource) -> StreamConfig:
    """Read ``specstream_config.json``; a missing file or field is answered with a filled-in template."""
    if not path.exists():
        raise InvalidInputError(
            f"{path}: file not found; it is not guessed. Write it with these values, '?' to be filled in from the "
            f"training run: {template(source)}"
        )
    raw = read_json(path)
    try:
        return StreamConfig.from_dict(raw, str(path))
    except InvalidInputError as error:
        if any(name not in raw for name in REQUIRED):
            raise InvalidInputError(
                f"{error}\n{path}: expected like this, '?' to be filled in from the training run: {template(source)}"
            ) from error
        raise


def template(source: StreamSource) -> str:
    """``specstream_config.json`` on one line, filled in as far as the tensors' shapes go."""

    def size(name: str, axis: int) -> Any:
        held = source.tensors.get(name)
        return held.shape[axis] if held is not None and len(held.shape) == 2 else "?"

    has_embeddings = "stream_embeddings" in source.tensors
    raw: dict[str, Any] = {
        "format": "specstream",
        "format_version": 1,
        "gamma": size("stream_embeddings", 0),
        "num_stream_layers": "?",
        "mode": "?",
        "stream_id": {"type": "embedding"} if has_embeddings else {"type": "value_rotation", "epsilon": "?"},
        "stream_init": {"type": "identity"},
        "stream_position": "?",
        "prune": None,
    }
    if "stream_init.down.weight" in source.tensors:
        raw["stream_init"] = {"type": "low_rank", "rank": size("stream_init.down.weight", 0), "residual": "?"}
    if "prune.down.weight" in source.tensors:
        rank = size("prune.down.weight", 0)
        raw["prune"] = {"type": "low_rank", "rank": rank, "layer": "?", "residual": "?", "final_norm": "?"}
    return json.dumps(raw)


def check_streams(source: StreamSource, config: StreamConfig, hidden_size: int, where: Path) -> list[str]:
    """Compare tensors with the configuration; return warnings.

    Raises:
        InvalidInputError: missing, superfluous, of another shape, not float, or not finite (all are listed).
    """
    for held in source.tensors.values():
        for row in held.rows:
            row.require_float()
    expected = config.tensor_shapes(hidden_size)
    problems = [
        f"{where}: {PREFIX}{name} {shape} is needed by {CONFIG_NAME} and was not saved; save it or correct that file"
        for name, shape in expected.items()
        if name not in source.tensors
    ]
    for name, held in source.tensors.items():
        place = held.place
        wanted = expected.get(name)
        if wanted is None:
            problems.append(f"{place}: not needed by {CONFIG_NAME}; correct the configuration or --ignore-keys it")
        elif held.shape != wanted:
            problems.append(f"{place}: shape {held.shape}, expected {wanted}{_hint(name, held, wanted, config)}")
    refuse(problems)
    warnings = []
    for name, held in source.tensors.items():
        value = held.read()
        if name != "stream_embeddings" and not bool((value != 0).any().item()):
            warnings.append(f"{PREFIX}{name} is all zero: it looks untrained")
        if name == "stream_embeddings":
            if not bool((value != 0).any().item()):
                warnings.append(f"{PREFIX}{name} is all zero: it looks untrained")
            elif value.shape[0] > 1 and bool((value == value[:1]).all().item()):
                warnings.append(f"{PREFIX}{name} has equal rows: it looks untrained")
    return warnings


def _hint(name: str, held: Source, wanted: tuple[int, ...], config: StreamConfig) -> str:
    shape = held.shape
    if shape == tuple(reversed(wanted)) and len(held.rows) == 1:
        turn = json.dumps({held.rows[0].raw: f"{PREFIX}{name}{TRANSPOSED}"})
        return f"; it is transposed; turn it with --key-map and a file that holds {escaped(turn)}"
    if name == "stream_embeddings" and len(shape) == 2 and shape[1] == wanted[1]:
        return f"; gamma is {config.gamma} in {CONFIG_NAME}, the tensor has {shape[0]} rows"
    return "; the base or the configuration is another one"
