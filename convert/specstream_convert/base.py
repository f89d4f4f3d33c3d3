"""The base model: a directory of transformers 4 or 5 or of mlx-lm, described without loading its weights.

``config.json`` is brought to the form mlx-lm reads. mlx-lm takes ``rope_theta`` and ``rope_scaling`` from the top
level and falls back to a class default without a word, so the nested form of transformers 5 is lifted, and a form
that is not known is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from specstream_convert.layouts import LAYOUTS, Layout
from specstream_convert.messages import at, escaped, listing
from specstream_convert.pickles import NO_PICKLES, Pickles
from specstream_convert.safetensors_io import TensorFile
from specstream_convert.shards import open_model_shards
from specstream_convert.stored import StoredTensor, Weights
from specstream_mlx.config import read_json
from specstream_mlx.errors import InvalidInputError, UnsupportedError

_TOO_LARGE = (MemoryError, OverflowError)
MAX_LAYERS = 1000  # building the modules of more takes seconds and hundreds of megabytes
ROPE_TYPES = {
    "llama": ("default", "linear", "llama3", "yarn"),
    "mistral": ("default", "linear", "llama3", "yarn"),
    "qwen2": ("default", "linear", "yarn"),
    "qwen3": ("default", "linear", "yarn"),
    "phi3": ("default", "linear", "longrope", "su"),
}
# rope_parameters -> rope_scaling; anything else in rope_parameters is unknown and refused.
ROPE_FIELDS = frozenset(
    (
        "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor",
        "long_factor", "short_mscale", "long_mscale",
    )
)  # fmt: skip
_REPO_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")
_DOWNLOADS = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja")
_PICKLED_DOWNLOADS = ("pytorch_model*.bin",)  # only where there is no model*.safetensors


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
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

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
        return {
            "name_or_path": self.name,
            **({"revision": self.revision} if self.revision else {}),
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "vocab_size": config["vocab_size"],
            "tie_word_embeddings": config["tie_word_embeddings"],
        }


def resolve_base(
    name_or_path: str, revision: str | None, relative_to: Path | None = None, *, pickled: bool = False
) -> tuple[Path, str]:
    """The directory of a base model and the name to record; a repo id is downloaded, a missing path is an error.

    A path that an adapter records may be relative to the adapter's own directory (``relative_to``).
    Pickled weights are downloaded only if ``pickled``, and only where there are no others.
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
    return _download(name_or_path, revision, pickled), name_or_path


def _download(repo: str, revision: str | None, pickled: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_DOWNLOADS)))
        if pickled and not any(path.glob("model*.safetensors")):
            snapshot_download(repo, revision=revision, allow_patterns=list(_PICKLED_DOWNLOADS))
        return path
    except Exception as error:  # the hub raises many kinds: offline, missing, gated, bad revision
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(
            f"{repo}: no such directory, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); give a local directory with --hf-path"
        ) from error


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
    layout = LAYOUTS[config["model_type"]]
    if held is None:
        held = Weights(path, open_model_shards(path, pickles)).tensors
    files = tuple({tensor.file.path: tensor.file for tensor in held.values()}.values())
    tensors, dropped = _named(held, layout)
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


def mlx_config(raw: dict[str, Any], where: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """``config.json`` in the form mlx-lm reads, with notes and warnings on what was changed."""
    config = dict(raw)
    notes: list[str] = []
    warnings: list[str] = []
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedError(f"{where}: model_type is {escaped(repr(model_type))}; this is not a model's config.json")
    if model_type not in LAYOUTS:
        raise UnsupportedError(
            f"{where}: model_type {escaped(repr(model_type))} is not supported; supported: {', '.join(LAYOUTS)}"
        )
    if config.get("model_file") is not None:
        raise UnsupportedError(
            f"{where}: model_file names code to be run from the checkpoint; it is never run, remove it"
        )
    _check_numbers(config, where)
    _check_quantization(config, where)
    if config.pop("auto_map", None) is not None:
        notes.append("config.json: auto_map dropped; mlx-lm's own model is used, no code of the checkpoint is run")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"{where}: hidden_act is {escaped(repr(activation))}; mlx-lm computes silu here")
    _lift_rope(config, model_type, where, notes)
    window = config.get("sliding_window")
    ignores_window = model_type == "phi3" or (model_type in ("llama", "mistral") and not config.get("layer_types"))
    if isinstance(window, int) and ignores_window:
        warnings.append(
            f"mlx-lm runs {model_type} without its sliding window of {window} tokens: "
            "longer prompts differ from PyTorch"
        )
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        warnings.append(
            "mlx-lm uses the long factors of longrope at every length: prompts within the original context "
            "differ from PyTorch"
        )
    return config, notes, warnings


def _check_numbers(config: dict[str, Any], where: Path) -> None:
    problems = []
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value < 2**31:
            problems.append(f"{where}: {name} is {escaped(repr(value))}, expected an integer >= 1")
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > MAX_LAYERS:
        problems.append(f"{where}: num_hidden_layers is {layers}, which no model has")
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value < 2**31):
            problems.append(f"{where}: {name} is {escaped(repr(value))}, expected an integer >= 1")
    epsilon = config.get("rms_norm_eps")
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        problems.append(f"{where}: rms_norm_eps is {escaped(repr(epsilon))}, expected a small number")
    tie = config.get("tie_word_embeddings", False)
    if not isinstance(tie, bool):
        problems.append(f"{where}: tie_word_embeddings is {escaped(repr(tie))}, expected true or false")
    if problems:
        raise InvalidInputError(listing(problems))


def _check_quantization(config: dict[str, Any], where: Path) -> None:
    if "quantization" in config:
        how = config["quantization"]
        if not isinstance(how, dict) or not all(type(how.get(name)) is int for name in ("bits", "group_size")):
            raise InvalidInputError(f"{where}: quantization needs integers bits and group_size; restore the file")
        return
    foreign = config.get("quantization_config")
    if foreign is not None:
        method = foreign.get("quant_method", "unnamed") if isinstance(foreign, dict) else foreign
        raise UnsupportedError(
            f"{where}: the base is quantised ({escaped(str(method))}); give the full-precision base with --hf-path"
        )


def _lift_rope(config: dict[str, Any], model_type: str, where: Path, notes: list[str]) -> None:
    """Bring ``rope_parameters`` of transformers 5 to ``rope_theta`` and ``rope_scaling`` at the top level."""
    nested = config.pop("rope_parameters", None)
    if nested is not None:
        if not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values()):
            raise UnsupportedError(
                f"{where}: rope_parameters is {escaped(repr(nested))}: one set for all layers expected"
            )
        scaling = dict(nested)
        for name in ("rope_theta", "partial_rotary_factor"):
            if name not in scaling:
                continue
            value = scaling.pop(name)
            if name in config and config[name] != value:
                raise InvalidInputError(
                    f"{where}: {name} is {config[name]!r}, but {value!r} in rope_parameters; remove the wrong one"
                )
            config[name] = value
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type != "default":
            older = config.get("rope_scaling")
            if older is not None and older != nested and older != scaling:
                raise InvalidInputError(f"{where}: rope_scaling and rope_parameters differ; remove the wrong one")
            config["rope_scaling"] = scaling
        elif config.get("rope_scaling") is None:
            config["rope_scaling"] = None
        notes.append("config.json: rope_parameters lifted to rope_theta and rope_scaling, where mlx-lm reads them")
    theta = config.get("rope_theta")
    if theta is None:
        if model_type == "qwen2":
            raise InvalidInputError(f"{where}: rope_theta is missing, and its defaults differ; add it to config.json")
        config["rope_theta"] = 10000.0
        notes.append("config.json: no rope_theta, set to 10000 as transformers does")
    elif isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e15:
        raise InvalidInputError(f"{where}: rope_theta is {escaped(repr(theta))}, expected a positive number")
    given = config.get("rope_scaling")
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidInputError(f"{where}: rope_scaling is {escaped(repr(given))}, expected an object")
    scaling = dict(given)
    rope_type = scaling.get("rope_type", scaling.get("type"))
    unknown = sorted(set(scaling) - ROPE_FIELDS)
    if rope_type not in ROPE_TYPES[model_type] or unknown:
        detail = f"unknown field {escaped(unknown[0])}" if unknown else f"rope type {escaped(repr(rope_type))}"
        raise UnsupportedError(
            f"{where}: {detail} in the position encoding is not supported for {model_type}; "
            f"supported types: {', '.join(ROPE_TYPES[model_type])}"
        )
    original = scaling.get("original_max_position_embeddings")
    if model_type == "phi3" and original is not None:
        config.setdefault("original_max_position_embeddings", original)
    scaling["type"] = scaling["rope_type"] = rope_type
    config["rope_scaling"] = None if rope_type == "default" else scaling


def _module_tree(
    config: dict[str, Any], where: Path
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Parameter shapes, linear layers and embeddings of mlx-lm's model; its arrays are lazy and never computed."""
    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError, RuntimeError, *_TOO_LARGE) as error:
        reason = escaped(" ".join(str(error).split()))
        raise InvalidInputError(f"{where}: mlx-lm cannot build the model ({reason}); restore config.json") from error
    parameters = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}

    def shapes(kind: type[nn.Module]) -> dict[str, tuple[int, int]]:
        found = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, kind)}
        return {name: (int(shape[0]), int(shape[1])) for name, shape in found.items()}

    return parameters, shapes(nn.Linear), shapes(nn.Embedding)


def _named(held: Mapping[str, StoredTensor], layout: Layout) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors by mlx-lm's names, and the raw names of those that are no parameters."""
    tensors: dict[str, StoredTensor] = {}
    dropped: dict[str, str] = {}
    for given, tensor in held.items():
        if layout.is_ignored(given):
            dropped[tensor.raw] = "recomputed by the model"
            continue
        name = layout.name(given)
        if name in tensors:
            raise InvalidInputError(f"{tensor.place}: means the same tensor as {tensors[name].place}")
        tensors[name] = replace(tensor, transposed=name != given and layout.is_transposed(name))
    return tensors, dropped


def _drop_tied_head(config: dict[str, Any], layout: Layout, tensors: dict[str, StoredTensor]) -> dict[str, str]:
    """Take out a tied head's own copy; refuse one that differs."""
    head, embedding = f"{layout.head}.weight", f"{layout.embedding}.weight"
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
