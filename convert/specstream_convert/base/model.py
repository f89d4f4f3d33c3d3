"""The base model: a directory of transformers 4 or 5 or of mlx-lm, described without loading its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from specstream_convert.base.config import mlx_config
from specstream_convert.files.pickles import NO_PICKLES, Pickles
from specstream_convert.files.shards import open_model_shards
from specstream_convert.files.stored import StoredTensor, Weights
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.families import CONVERTED, FAMILIES, model_classes
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.families.hugging_face import HuggingFace
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.messages import at, escaped, refuse
from specstream_mlx.formats.places import download, fetch, locate
from specstream_mlx.formats.safetensors import TensorFile

_CANNOT_BUILD = (
    TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, RuntimeError, AssertionError, MemoryError,
    OverflowError,
)  # fmt: skip
_WEIGHTS = ("model*.safetensors",)
_PICKLED_WEIGHTS = ("pytorch_model*.bin",)  # only where there is no model*.safetensors


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
    def hugging_face(self) -> HuggingFace:
        """The model's kind in Hugging Face's form."""
        return CONVERTED[self.model_type]

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
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        return bool(self.config["tie_word_embeddings"])

    def summary(self) -> dict[str, Any]:
        """The fields that ``specstream_config.json`` records of a base."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"name_or_path": self.name} | revision | self.family.describe(self.config)


def resolve_base(
    name_or_path: str, revision: str | None, relative_to: Path | None = None, *, pickled: bool = False
) -> tuple[Path, str, str | None]:
    """The directory of a base model, the name to record and its revision; a repository is downloaded.

    A path that an adapter records may be relative to the adapter's own directory (``relative_to``), and a revision
    that it records is of the repository alone. Pickled weights are downloaded only if ``pickled``, and only where
    there are no others.

    Raises:
        InvalidInputError: a missing path, or a repository that cannot be had.
        UnsupportedError: a repository whose ``config.json`` is not of a model that is converted.
    """
    try:
        if relative_to is not None:
            for candidate in (Path(name_or_path).expanduser(), relative_to / Path(name_or_path).expanduser()):
                if name_or_path.strip() and candidate.is_dir():
                    return candidate, candidate.resolve().name, revision
        place = locate(name_or_path, revision or None, bare_names=True)
        if isinstance(place, Path):
            return place, place.resolve().name, None
        path = fetch(place, judge=_judge, weights=_WEIGHTS)
        if pickled and not any(path.glob("model*.safetensors")):
            path = download(place, _PICKLED_WEIGHTS)
    except UsageError as error:  # of a revision; what an adapter records is input
        raise error if relative_to is None else InvalidInputError(f"base model: {error}") from error
    except (InvalidInputError, OSError, ValueError) as error:
        raise InvalidInputError(f"base model: {error}; --hf-path names it") from error
    return path, place.name, place.revision


def _judge(directory: Path) -> None:
    where = directory / "config.json"
    mlx_config(read_json(where), where)


def open_base(
    path: Path,
    name: str,
    revision: str | None = None,
    pickles: Pickles = NO_PICKLES,
    held: Mapping[str, StoredTensor] | None = None,
) -> Base:
    """Describe the base in ``path``: its configuration for mlx-lm, its tensors, its linear layers.

    ``held`` are its tensors by their Hugging Face names, where they are not the directory's model files.

    Raises:
        InvalidInputError: files missing, damaged, or not those of the model that ``config.json`` describes.
        UnsupportedError: a model family, quantisation or position encoding with no exact result here.
    """
    where = path / "config.json"
    config, notes, warnings = mlx_config(read_json(where), where)
    family, theirs = FAMILIES[config["model_type"]], CONVERTED[config["model_type"]]
    if held is None:
        held = Weights(path, open_model_shards(path, pickles)).tensors
    files = tuple({tensor.file.path: tensor.file for tensor in held.values()}.values())
    tensors, dropped = _named(held, theirs)
    if "tie_word_embeddings" not in config:
        config["tie_word_embeddings"] = f"{family.HEAD}.weight" not in tensors
        notes.append(f"config.json has no tie_word_embeddings; set to {config['tie_word_embeddings']} by the tensors")
    parameters, linear, embeddings = _module_tree(config, where)
    dropped |= _drop_tied_head(config, family, tensors)
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


def lazy_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that ``config`` describes, its weights random and not computed."""
    model_class, args_class = model_classes(dict(config))
    model: nn.Module = model_class(args_class.from_dict(dict(config)))
    mx.eval(mx.random.state)  # or the lazy keys of every model built so far would stay in memory
    return model


def _module_tree(
    config: dict[str, Any], where: Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Parameter shapes, linear layers and embeddings of mlx-lm's model; its arrays are lazy and never computed."""
    try:
        model = lazy_model(config)
    except _CANNOT_BUILD as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(f"{where}: mlx-lm cannot build the model ({reason}); restore config.json") from error
    parameters = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}

    def shapes(kind: type[nn.Module]) -> dict[str, tuple[int, int]]:
        found = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, kind)}
        return {name: (int(shape[0]), int(shape[1])) for name, shape in found.items()}

    return parameters, shapes(nn.Linear), shapes(nn.Embedding)


def can_untie(base: Base) -> bool:
    """Whether the family's model may have an LM head of its own."""
    untied, _, _ = _module_tree(base.config | {"tie_word_embeddings": False}, base.path / "config.json")
    return f"{base.family.HEAD}.weight" in untied


def _named(held: Mapping[str, StoredTensor], theirs: HuggingFace) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by mlx-lm's names, and the raw names of those that are no parameters."""
    tensors: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    for given, tensor in held.items():
        if theirs.is_ignored(given):
            dropped[tensor.raw] = "recomputed by the model"
            continue
        name = theirs.name(given)
        if name in tensors:
            raise InvalidInputError(f"{tensor.place}: means the same tensor as {tensors[name].place}")
        tensors[name] = replace(tensor, transposed=name != given and theirs.is_transposed(name))
    return tensors, dropped


def _drop_tied_head(
    config: dict[str, Any], family: type[DecoderFamily], tensors: dict[str, StoredTensor]
) -> dict[str, str]:
    """Take out a tied head's own copy; refuse one that differs."""
    head, embedding = f"{family.HEAD}.weight", f"{family.EMBEDDING}.weight"
    if not config["tie_word_embeddings"] or head not in tensors:
        return {}
    if embedding in tensors and not tensors[head].equals(tensors[embedding]):
        raise InvalidInputError(
            f"{tensors[head].place}: differs from {embedding} although config.json says "
            "tie_word_embeddings true; set it to false or remove the tensor"
        )
    return {tensors.pop(head).raw: f"tied: equal to {embedding}"}


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
    refuse(problems)


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
