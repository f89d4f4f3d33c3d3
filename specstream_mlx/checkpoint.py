"""A directory or repository -> (model, tokenizer).

A model directory is an mlx-lm directory with ``specstream_config.json`` and ``specstream.safetensors`` beside the
base. mlx-lm loads the base; here the stream tensors are checked against the configuration, name by name and shape by
shape, and against the base they were trained for.
"""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model, load_tokenizer
from safetensors import SafetensorError, safe_open

from specstream_mlx.bundled import default_model_path
from specstream_mlx.config import (
    CONFIG_NAME,
    LORA_PREFIX,
    PREFIX,
    WEIGHTS_NAME,
    StreamConfig,
    read_json,
)
from specstream_mlx.errors import InvalidInputError, UnsupportedError
from specstream_mlx.families import FAMILIES, check_supported, family_of, model_classes
from specstream_mlx.families.decoder import DecoderFamily
from specstream_mlx.fingerprint import is_marked
from specstream_mlx.model import SpecStreamModel
from specstream_mlx.streams import StreamLoRALinear, Streams

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FLOATS = ("F32", "F16", "BF16")
_DOWNLOAD = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]


def load(
    path_or_repo: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[SpecStreamModel, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_repo: a directory, or a Hugging Face repository id; None for the bundled model.
        adapter: a stream adapter (sidecar) to put over the base.
        tokenizer_config: extra arguments for the tokenizer.
        trust_remote_code: let mlx-lm run model code that comes with the checkpoint.
        lazy: leave weights unread until they are used.

    Returns:
        The model and an mlx-lm ``TokenizerWrapper``. A directory without streams gives a model that decodes plainly.

    Raises:
        InvalidInputError: missing, damaged or mismatched files.
        UnsupportedError: a family, format version or variant that we do not run.
    """
    path = resolve(path_or_repo) if path_or_repo is not None else default_model_path()
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        raise InvalidInputError(f"{path}: a PEFT adapter, not a model; run specstream-mlx convert on it first")
    config = read_json(path / "config.json")
    check_supported(config.get("model_type"), f"{path / 'config.json'}: model_type")
    family = FAMILIES[config["model_type"]]
    overlooked = family.size(config, "rope_parameters") is not None and family.size(config, "rope_theta") is None
    if overlooked and config["model_type"] != "qwen3":
        # mlx-lm reads rope_parameters for qwen3 alone and would fall back to a default base elsewhere.
        raise UnsupportedError(
            f"{path / 'config.json'}: rope_parameters (transformers 5), which mlx-lm does not read for this family, so "
            "all positions would be wrong; put its rope_theta (and rope_scaling) at the top level"
        )
    weight_files = sorted(path.glob("model*.safetensors"))
    if not weight_files:
        raise InvalidInputError(f"{path}: no model*.safetensors; give an MLX model directory (see convert)")
    for file in weight_files:
        check_safetensors(file)
    try:
        base, config = load_model(path, lazy=lazy, get_model_classes=model_classes, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        raise _load_error(path, error) from error
    source = resolve(adapter) if adapter is not None else path
    adapters = source / "adapters"
    if adapters.is_dir():
        try:
            base = load_adapters(base, str(adapters))
        except (ValueError, KeyError, AttributeError, FileNotFoundError, RuntimeError) as error:
            raise _load_error(adapters, error) from error
    base.eval()
    model = _with_streams(base, config, source, required=adapter is not None)
    try:
        tokenizer = load_tokenizer(
            path,
            {"trust_remote_code": trust_remote_code} | (tokenizer_config or {}),
            eos_token_ids=config.get("eos_token_id"),
        )
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise _load_error(path, error, "tokenizer files") from error
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer


def resolve(path_or_repo: str | Path) -> Path:
    """A local directory as it is; a repository id through the Hugging Face cache or a download.

    Raises:
        InvalidInputError: a local-looking path that is not a directory, or a repository that cannot be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_repo)
    if path.exists():
        raise InvalidInputError(f"{text}: is a file; give the model's directory")
    looks_local = (
        isinstance(path_or_repo, Path) or text.startswith(".") or (path.parent.is_dir() and path.parent != Path())
    )
    if looks_local or not _REPO_ID.fullmatch(text):
        raise InvalidInputError(f"{text}: no such directory; give an existing one, or a repository id like org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=_DOWNLOAD))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInputError(
            f"{text}: neither a directory nor a repository that can be downloaded ({reason})"
        ) from error


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Validate a safetensors file's header and extent before anything maps it.

    Returns:
        Name -> (dtype, shape).

    Raises:
        InvalidInputError: not a regular file, empty, truncated, or not safetensors.
    """
    if not path.is_file():
        raise InvalidInputError(f"{path}: not a regular file; restore it")
    if path.stat().st_size == 0:
        raise InvalidInputError(f"{path}: empty file; restore or download it again")
    try:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise InvalidInputError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull")
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
    except SafetensorError as error:
        raise InvalidInputError(f"{path}: damaged safetensors file ({error}); download or convert it again") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _with_streams(base: nn.Module, config: dict[str, Any], source: Path, required: bool) -> SpecStreamModel:
    model_type = str(config.get("model_type"))
    config_file, weights_file = source / CONFIG_NAME, source / WEIGHTS_NAME
    if not config_file.exists() and not weights_file.exists():
        if required:
            raise InvalidInputError(f"{source}: no {CONFIG_NAME} and {WEIGHTS_NAME}; give a converted stream adapter")
        return SpecStreamModel(base, model_type)
    stream_config = StreamConfig.from_dict(read_json(config_file), str(config_file))
    family = family_of(base, model_type)
    _check_base(stream_config, family, base, config, config_file)
    hidden_size = family.size(config, "hidden_size")
    streams = Streams(stream_config, hidden_size)
    tensors = _read_streams(weights_file, stream_config, hidden_size)
    dtype = family.dtype
    lora = {name: tensors.pop(name).astype(dtype) for name in list(tensors) if name.startswith(LORA_PREFIX)}
    streams.update(
        tree_unflatten([(name.removeprefix(PREFIX), value.astype(dtype)) for name, value in tensors.items()])
    )
    model = SpecStreamModel(base, model_type, stream_config, streams)
    if lora:
        _attach_stream_lora(model, lora, stream_config, weights_file)
    elif stream_config.mode == "lossless" and stream_config.lora:
        raise InvalidInputError(f"{weights_file}: {CONFIG_NAME} names a LoRA and no {LORA_PREFIX}* tensor is there")
    return model


def _read_streams(path: Path, config: StreamConfig, hidden_size: int) -> dict[str, mx.array]:
    """The stream tensors, every one checked, problems collected."""
    found = check_safetensors(path)
    expected = {PREFIX + name: shape for name, shape in config.tensor_shapes(hidden_size).items()}
    problems = [f"{path}:{name}: missing" for name in expected if name not in found]
    for name, (dtype, shape) in found.items():
        lora = name.startswith(LORA_PREFIX) and config.mode == "lossless"
        if name not in expected and not lora:
            problems.append(f"{path}:{name}: not expected by {CONFIG_NAME}")
        elif dtype not in _FLOATS:
            problems.append(f"{path}:{name}: dtype {dtype}, expected one of {', '.join(_FLOATS)}")
        elif not lora and shape != expected[name]:
            problems.append(f"{path}:{name}: shape {shape}, {CONFIG_NAME} and the base need {expected[name]}")
    if problems:
        raise InvalidInputError("\n".join(problems))
    tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    bad = [name for name, value in tensors.items() if not mx.isfinite(value).all().item()]
    if bad:
        raise InvalidInputError("\n".join(f"{path}:{name}: holds NaN or infinite values" for name in bad))
    return tensors


def _check_base(
    stream_config: StreamConfig, family: DecoderFamily, base: nn.Module, config: dict[str, Any], where: Path
) -> None:
    """The streams' base block against the base at hand: sizes, and the fingerprint when both sides have one."""
    problems = []
    trained_for = stream_config.base_model
    keys = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    for key in keys:
        found = family.size(config, key)
        if key in trained_for and found is not None and trained_for[key] != found:
            problems.append(f"{where}: streams were trained for {key} {trained_for[key]!r}, this base has {found!r}")
    layers = len(family.layers)
    if stream_config.num_stream_layers > layers:
        problems.append(
            f"{where}: num_stream_layers is {stream_config.num_stream_layers}, the base has {layers} layers"
        )
    if stream_config.prune is not None and stream_config.prune.layer > layers:
        problems.append(f"{where}: prune.layer is {stream_config.prune.layer}, the base has {layers} layers")
    mark: Any = trained_for.get("fingerprint")
    marked = family.fingerprint_tensor(config)
    if isinstance(mark, dict) and marked is not None and mark.get("tensor") == marked:
        weight: mx.array = dict(tree_flatten(base.parameters()))[marked]
        if not is_marked(mark, weight):
            problems.append(
                f"{where}: fingerprint of {marked} differs; the shapes fit, but this is another base than "
                f"{trained_for.get('name_or_path', 'the one the streams were trained for')!r}"
            )
    if problems:
        raise InvalidInputError("\n".join(problems))


def _attach_stream_lora(
    model: SpecStreamModel, lora: dict[str, mx.array], stream_config: StreamConfig, where: Path
) -> None:
    """Wrap the linear layers that a lossless checkpoint has LoRA for; main rows keep running the base."""
    scale = (stream_config.lora or {}).get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise InvalidInputError(f"{where.parent / CONFIG_NAME}: lora.scale is {scale!r}, expected a number")
    modules = dict(model.base.named_modules())
    problems, wrapped = [], []
    paths = sorted({name.removeprefix(LORA_PREFIX).rsplit(".", 1)[0] for name in lora})
    for path in paths:
        a, b = lora.pop(f"{LORA_PREFIX}{path}.lora_a", None), lora.pop(f"{LORA_PREFIX}{path}.lora_b", None)
        linear = modules.get(path)
        match = re.match(rf"{re.escape(model.family.LAYERS)}\.(\d+)\.", path)
        if a is None or b is None:
            problems.append(f"{where}:{LORA_PREFIX}{path}: needs both lora_a and lora_b")
        elif match is None or int(match[1]) < model.num_trunk_layers:
            problems.append(f"{where}:{LORA_PREFIX}{path}: lies below the stream layers, it would never act")
        elif not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            has = "no layer of this name" if linear is None else f"a {type(linear).__name__} here"
            problems.append(
                f"{where}:{LORA_PREFIX}{path}: LoRA on stream rows needs a linear layer, the base has {has}"
            )
        elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or (a.shape[0], b.shape[1]) != _dims(linear):
            problems.append(f"{where}:{LORA_PREFIX}{path}: shapes {a.shape} and {b.shape} do not fit {_dims(linear)}")
        else:
            wrapped.append((path, StreamLoRALinear(linear, a, b, float(scale), model.context)))
    problems += [f"{where}:{name}: unknown LoRA tensor" for name in lora]
    if problems:
        raise InvalidInputError("\n".join(problems))
    model.base.update_modules(tree_unflatten(wrapped))


def _dims(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantised or not."""
    out, columns = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        columns = columns * 32 // linear.bits
    return columns, out


def _load_error(path: Path, error: Exception, what: str = "model") -> Exception:
    """One of ours for whatever mlx-lm raised, in one line."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if "not supported" in reason or "model_file" in reason or "trust_remote_code" in reason:
        return UnsupportedError(f"{path}: {reason}")
    return InvalidInputError(f"{path}: {what} cannot be loaded ({type(error).__name__}: {reason})")
