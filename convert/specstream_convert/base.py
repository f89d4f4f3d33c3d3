"""The base model: a directory of transformers 4 or 5 or of mlx-lm, described without loading its weights."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from specstream_convert.base_config import mlx_config
from specstream_convert.layouts import LAYOUTS, Layout
from specstream_convert.messages import at, escaped, listing
from specstream_convert.safetensors_io import TensorFile, open_tensors
from specstream_convert.stored import StoredTensor
from specstream_mlx.config import read_json
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.families import FAMILIES, model_classes
from specstream_mlx.families.decoder import DecoderFamily

_CANNOT_BUILD = (
    TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, RuntimeError, AssertionError, MemoryError,
    OverflowError,
)  # fmt: skip
INDEX_NAME = "model.safetensors.index.json"
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")
_DOWNLOADS = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Base:
    """A base model: where its tensors are, and the configuration mlx-lm will read."""

    path: Path
    name: str  # repo id, or the directory's own name
    revision: str | None
    config: dict[str, Any]  # as mlx-lm reads it
    files: tuple[TensorFile, ...]
    tensors: dict[str, StoredTensor]  # kept tensors by mlx-lm's name
    dropped: dict[str, str]  # raw name -> why it is not written
    parameters: dict[str, tuple[int, ...]]  # of the unquantised model
    linear: dict[str, tuple[int, int]]  # module -> (out, in)
    embeddings: dict[str, tuple[int, int]]  # module -> (rows, width)
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def family(self) -> type[DecoderFamily]:
        """What the runtime knows of the model's kind."""
        return FAMILIES[self.model_type]

    @property
    def hidden_size(self) -> int:
        return int(self.family.size(self.config, "hidden_size"))

    @property
    def num_layers(self) -> int:
        return int(self.family.size(self.config, "num_hidden_layers"))

    @property
    def num_positions(self) -> int | None:
        """The learned positions there are; None with rotary ones, which have no end."""
        return None if self.family.ROTARY else int(self.family.size(self.config, "max_position_embeddings"))

    @property
    def quantized(self) -> bool:
        return "quantization" in self.config

    @property
    def layout(self) -> Layout:
        """Where the family keeps its parts."""
        return LAYOUTS[self.model_type]

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return bool(self.config["tie_word_embeddings"])

    def summary(self) -> dict[str, Any]:
        """The fields that ``specstream_config.json`` records of a base."""
        config = self.config
        heads = self.family.size(config, "num_attention_heads")
        return {
            "name_or_path": self.name,
            **({"revision": self.revision} if self.revision else {}),
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "vocab_size": config["vocab_size"],
            "tie_word_embeddings": config["tie_word_embeddings"],
        }


def resolve_base(name_or_path: str, revision: str | None, relative_to: Path | None = None) -> tuple[Path, str]:
    """The directory of a base model and the name to record; a repo id is downloaded, a missing path is an error.

    A path that an adapter records may be relative to the adapter's own directory (``relative_to``).
    """
    if "\0" in name_or_path or not name_or_path.strip():
        raise InvalidInputError(f"the base model name {escaped(repr(name_or_path))} is not usable; give --hf-path")
    path = Path(name_or_path).expanduser()
    try:
        for candidate in (path, *([] if relative_to is None else [relative_to / path])):
            if candidate.is_dir():
                return candidate, candidate.resolve().name
        if path.exists():
            raise InvalidInputError(f"{path}: not a directory; give the model's directory as --hf-path")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{escaped(name_or_path)}: cannot be read ({error}); give --hf-path") from error
    local = name_or_path.startswith((".", "/", "~")) or "\\" in name_or_path or not _REPO_ID.match(name_or_path)
    if local or ".." in name_or_path:
        raise InvalidInputError(f"{escaped(name_or_path)}: no such directory; give the base model with --hf-path")
    return _download(name_or_path, revision), name_or_path


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_DOWNLOADS)))
    except Exception as error:  # the hub raises many kinds: offline, missing, gated, bad revision
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(
            f"{repo}: no such directory, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); give a local directory with --hf-path"
        ) from error


def open_base(path: Path, name: str, revision: str | None = None) -> Base:
    """Describe the base in ``path``: its configuration for mlx-lm, its tensors, its linear layers.

    Raises:
        InvalidInputError: files missing, damaged, or not those of the model that ``config.json`` describes.
        UnsupportedError: a model family, quantisation or position encoding with no exact result here.
    """
    where = path / "config.json"
    config, notes, warnings = mlx_config(read_json(where), where)
    layout = LAYOUTS[config["model_type"]]
    files = _open_shards(path)
    tensors, dropped = _named(files, layout)
    if "tie_word_embeddings" not in config:
        config["tie_word_embeddings"] = f"{layout.head}.weight" not in tensors
        notes.append(f"config.json has no tie_word_embeddings; set to {config['tie_word_embeddings']} by the tensors")
    parameters, linear, embeddings = _module_tree(config, where)
    dropped |= _drop_tied_head(config, layout, tensors)
    if "quantization" in config:
        parameters_held = _check_quantized(tensors, parameters, config["quantization"])
    else:
        parameters_held = parameters
    _check_tensors(path, tensors, parameters_held)
    return Base(
        path=path,
        name=name,
        revision=revision,
        config=config,
        files=files,
        tensors=tensors,
        dropped=dropped,
        parameters=parameters,
        linear=linear,
        embeddings=embeddings,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _module_tree(
    config: dict[str, Any], where: Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Parameter shapes, linear layers and embeddings of mlx-lm's model; its arrays are lazy and never computed."""
    try:
        model_class, args_class = model_classes(config)
        model = model_class(args_class.from_dict(config))
    except _CANNOT_BUILD as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(f"{where}: mlx-lm cannot build the model ({reason}); restore config.json") from error
    parameters = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}

    def shapes(kind: type[nn.Module]) -> dict[str, tuple[int, int]]:
        found = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, kind)}
        return {name: (int(shape[0]), int(shape[1])) for name, shape in found.items()}

    return parameters, shapes(nn.Linear), shapes(nn.Embedding)


def _named(files: Iterable[TensorFile], layout: Layout) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by mlx-lm's names, and the raw names of those that are no parameters."""
    tensors: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    for file in files:
        for raw in file.tensors:
            if layout.is_ignored(raw):
                dropped[raw] = "recomputed by the model"
                continue
            name = layout.name(raw)
            if name in tensors:
                raise InvalidInputError(f"{at(file.path, raw)}: means the same tensor as {tensors[name].place}")
            tensors[name] = StoredTensor(file, raw, transposed=name != raw and layout.is_transposed(name))
    return tensors, dropped


def _drop_tied_head(config: dict[str, Any], layout: Layout, tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Take out a tied head's own copy; refuse one that differs."""
    head, embedding = f"{layout.head}.weight", f"{layout.embedding}.weight"
    if not config["tie_word_embeddings"] or head not in tensors:
        return {}
    if embedding in tensors and not _same(tensors[head], tensors[embedding]):
        raise InvalidInputError(
            f"{tensors[head].place}: differs from {embedding} although config.json says "
            "tie_word_embeddings true; set it to false or remove the tensor"
        )
    return {tensors.pop(head).raw: f"tied: equal to {embedding}"}


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bool(mx.array_equal(first.read(), second.read()).item())


def _check_tensors(path: Path, kept: dict[str, StoredTensor], parameters: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(kept):
        if f"{name.removesuffix('.weight')}.scales" not in kept and not name.endswith(".scales"):
            kept[name].require_float()
    problems = []
    for name in sorted(set(parameters) - set(kept)):
        problems.append(f"{at(path, name)}: missing from the base's safetensors files; download the base again")
    for name in sorted(set(kept) - set(parameters)):
        problems.append(f"{kept[name].place}: not part of the model that config.json describes")
    for name in sorted(set(kept) & set(parameters)):
        shape = kept[name].shape
        if shape != parameters[name]:
            problems.append(f"{kept[name].place}: shape {shape}, config.json asks for {parameters[name]}")
    if problems:
        raise InvalidInputError(listing(problems))


def _check_quantized(
    kept: dict[str, StoredTensor], parameters: dict[str, tuple[int, ...]], quantization: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes a quantised base must have: packed weights where there are scales, plain ones elsewhere."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters.items():
        module = name.removesuffix(".weight")
        scales = f"{module}.scales"
        if not name.endswith(".weight") or scales not in kept:
            expected[name] = shape
            continue
        own = quantization.get(module)
        how = own if isinstance(own, dict) else quantization
        bits, group_size = how.get("bits"), how.get("group_size")
        if type(bits) is not int or type(group_size) is not int or bits < 1 or group_size < 1:
            raise InvalidInputError(
                f"config.json: quantization of {escaped(module)} needs integers bits and group_size"
            )
        expected[name] = (*shape[:-1], shape[-1] * bits // 32)
        expected[scales] = (*shape[:-1], shape[-1] // group_size)
        if f"{module}.biases" in kept:
            expected[f"{module}.biases"] = expected[scales]
    return expected


def _open_shards(path: Path) -> tuple[TensorFile, ...]:
    """The base's weight files, each tensor in exactly one of them."""
    present = sorted(file for file in path.iterdir() if re.fullmatch(r"model.*\.safetensors", file.name))
    index = path / INDEX_NAME
    if not present:
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"{escaped(others[0])} cannot be read, save it as safetensors" if others else "download the base again"
        raise InvalidInputError(f"{path}: no model*.safetensors; {hint}")
    if index.exists():
        wanted = _index_map(index)
        files = _exactly(index, present, set(wanted.values()))
        _check_index(index, wanted, files)
        return files
    if len(present) > 1:
        match = re.fullmatch(r"model-00001-of-(\d{5})\.safetensors", present[0].name)
        total = int(match.group(1)) if match else 0
        if [f.name for f in present] != [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]:
            raise InvalidInputError(
                f"{path}: {', '.join(escaped(f.name) for f in present)} without {INDEX_NAME}; mlx-lm would mix them, "
                "keep one complete set"
            )
    elif re.fullmatch(r"model-\d{5}-of-(?!00001)\d{5}\.safetensors", present[0].name):
        raise InvalidInputError(f"{present[0]}: only one shard of several is here; download the base again")
    files = tuple(open_tensors(file) for file in present)
    twice = _duplicates(files)
    if twice:
        raise InvalidInputError(listing(f"{at(path, name)}: in two weight files; keep one" for name in twice))
    return files


def _index_map(index: Path) -> dict[str, str]:
    raw = read_json(index)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InvalidInputError(f"{index}: weight_map is not an object of file names; download the base again")
    bad = sorted({v for v in weight_map.values() if not re.fullmatch(r"model[\w.\-]*\.safetensors", v) or ".." in v})
    if bad:
        raise InvalidInputError(
            listing(f"{index}: {escaped(repr(name))} is not the name of a shard beside it" for name in bad)
        )
    return weight_map


def _exactly(index: Path, present: list[Path], wanted: set[str]) -> tuple[TensorFile, ...]:
    names = {file.name for file in present}
    problems = [
        f"{index}: names {name}, which is not there; download the base again" for name in sorted(wanted - names)
    ]
    problems += [
        f"{index.parent / name}: not named in {INDEX_NAME}; mlx-lm would mix it in, remove it"
        for name in sorted(names - wanted)
    ]
    if problems:
        raise InvalidInputError(listing(problems))
    return tuple(open_tensors(file) for file in present)


def _check_index(index: Path, wanted: dict[str, str], files: tuple[TensorFile, ...]) -> None:
    held = {(name, file.path.name) for file in files for name in file.tensors}
    listed = set(wanted.items())
    problems = [f"{index}: {escaped(name)} is not in {file}" for name, file in sorted(listed - held)]
    problems += [f"{index}: {escaped(name)} of {file} is not listed" for name, file in sorted(held - listed)]
    if problems:
        raise InvalidInputError(listing(problems))


def _duplicates(files: Iterable[TensorFile]) -> list[str]:
    seen: set[str] = set()
    twice = []
    for file in files:
        twice += [name for name in file.tensors if name in seen]
        seen |= set(file.tensors)
    return twice
