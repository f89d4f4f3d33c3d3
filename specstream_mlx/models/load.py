"""A directory or repository -> (model, tokenizer).

A model directory is an mlx-lm directory with ``specstream_config.json`` and ``specstream.safetensors`` beside the
base. mlx-lm loads the base; the streams are put over it as any adapter is.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import StrictDataclassError
from mlx_lm.utils import load_model, load_tokenizer

from specstream_mlx.bundled import default_model_path
from specstream_mlx.errors import InvalidInputError, UnsupportedError, UsageError
from specstream_mlx.families import FAMILIES, check_supported, model_classes
from specstream_mlx.formats.adapter_directory import has_adapter
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.load_errors import load_error
from specstream_mlx.formats.places import resolve
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.models.adapters import OWN
from specstream_mlx.models.model import SpecStreamModel


def load(
    path_or_repo: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[SpecStreamModel, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_repo: a directory, or a Hugging Face repository id such as ``org/name`` or ``org/name@revision``; None
            for the bundled model.
        adapter: an adapter to put over the base instead of the streams that lie beside it; see
            ``SpecStreamModel.load_adapter``.
        adapter_path: mlx-lm's name of ``adapter``.
        revision: branch, tag or commit of the model's repository.
        tokenizer_config: extra arguments for the tokenizer.
        trust_remote_code: let mlx-lm and transformers run code that comes with the checkpoint.
        lazy: leave weights unread until they are used.

    Returns:
        The model and an mlx-lm ``TokenizerWrapper``. A directory without streams gives a model that decodes plainly.

    Raises:
        UsageError: two adapters, or a revision of a directory.
        InvalidInputError: missing, damaged or mismatched files.
        UnsupportedError: a family, format version or variant that we do not run.
    """
    if adapter is not None and adapter_path is not None:
        raise UsageError("adapter and adapter_path are two names of one argument; give one")
    adapter = adapter if adapter is not None else adapter_path
    path = model_directory(path_or_repo, revision, trust_remote_code=trust_remote_code)
    weight_files = sorted(path.glob("model*.safetensors"))
    if not weight_files:
        raise InvalidInputError(f"{path}: no model*.safetensors; give an MLX model directory (see convert)")
    for file in weight_files:
        check_safetensors(file)
    try:
        base, config = load_model(path, lazy=lazy, get_model_classes=model_classes, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        raise load_error(path, error) from error
    base.eval()
    model = SpecStreamModel(base, config["model_type"])
    if adapter is not None:
        model.use_adapter(model.load_adapter(adapter))
    elif has_adapter(path):
        model.use_adapter(model.load_adapter(path, name=OWN))
    try:
        tokenizer = load_tokenizer(
            path,
            {"trust_remote_code": trust_remote_code} | (tokenizer_config or {}),
            eos_token_ids=config.get("eos_token_id"),
        )
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise load_error(path, error, "tokenizer files") from error
    if not lazy:
        mx.eval(model.parameters())
    return model, tokenizer


def model_directory(
    path_or_repo: str | Path | None = None, revision: str | None = None, *, trust_remote_code: bool = False
) -> Path:
    """The directory of a model that can be run here; a repository is judged by ``config.json`` before the download.

    Args:
        path_or_repo: as for ``load``.
        revision: as for ``load``.
        trust_remote_code: also download the code that comes with a repository.

    Raises:
        UsageError: a revision of a directory.
        InvalidInputError: no such model, or a damaged configuration.
        UnsupportedError: a family that we do not run.
    """
    place = default_model_path() if path_or_repo is None else path_or_repo
    return resolve(place, revision, judge=check_configuration, code=trust_remote_code)


def check_configuration(directory: Path) -> None:
    """Refuse a model that we do not run, by its configuration alone.

    Raises:
        InvalidInputError: no or a damaged ``config.json``.
        UnsupportedError: a family that we do not run.
    """
    where = directory / "config.json"
    if not where.exists() and (directory / "adapter_config.json").exists():
        raise InvalidInputError(f"{directory}: a PEFT adapter, not a model; run specstream-mlx convert on it first")
    config = read_json(where)
    check_supported(config.get("model_type"), f"{where}: model_type")
    family = FAMILIES[config["model_type"]]
    overlooked = family.size(config, "rope_parameters") is not None and family.size(config, "rope_theta") is None
    if overlooked and config["model_type"] != "qwen3":
        # mlx-lm reads rope_parameters for qwen3 alone and would fall back to a default base elsewhere.
        raise UnsupportedError(
            f"{where}: rope_parameters (transformers 5), which mlx-lm does not read for this family, so "
            "all positions would be wrong; put its rope_theta (and rope_scaling) at the top level"
        )
