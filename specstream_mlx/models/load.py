"""A directory or repository -> (model, tokenizer).

A model directory is an mlx-lm directory with ``specstream_config.json`` and ``specstream.safetensors`` beside the
base. mlx-lm loads the base; the streams are put over it as any adapter is.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from specstream_mlx.bundled import default_model_path
from specstream_mlx.errors import InvalidInputError, UsageError
from specstream_mlx.families import FAMILIES, check_supported, model_classes
from specstream_mlx.families.rope_parameters import lifted
from specstream_mlx.formats.adapter_directory import has_adapter
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.load_errors import load_error
from specstream_mlx.formats.notes import note
from specstream_mlx.formats.places import resolve
from specstream_mlx.formats.safetensors import check_safetensors
from specstream_mlx.formats.tokenizers import open_tokenizer
from specstream_mlx.models.adapters import OWN
from specstream_mlx.models.head import HeadTensors
from specstream_mlx.models.model import SpecStreamModel

_CANNOT_LOAD = (
    ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


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
    base, config = load_base(path, lazy=lazy, trust_remote_code=trust_remote_code)
    model = SpecStreamModel(base, config["model_type"])
    if adapter is not None:
        model.use_adapter(model.load_adapter(adapter))
    elif has_adapter(path):
        model.use_adapter(model.load_adapter(path, name=OWN))
    tokenizer = open_tokenizer(
        path,
        {"trust_remote_code": trust_remote_code} | (tokenizer_config or {}),
        eos_token_ids=config.get("eos_token_id"),
    )
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
    check_supported(config, str(where))
    lifted(config, where)


def load_base(path: Path, *, lazy: bool = False, trust_remote_code: bool = False) -> tuple[Any, dict[str, Any]]:
    """The base in a model's directory as mlx-lm loads it, and its configuration as mlx-lm reads it.

    ``rope_parameters`` of transformers 5 are lifted to where mlx-lm reads them, and an LM head that lies in the files
    is the model's head.

    Raises:
        InvalidInputError: missing or damaged files, or a head that the configuration contradicts.
        UnsupportedError: a position encoding or a head that mlx-lm does not run in this family.
    """
    where = path / "config.json"
    weight_files = sorted(path.glob("model*.safetensors"))
    if not weight_files:
        raise InvalidInputError(f"{path}: no model*.safetensors; give an MLX model directory (see convert)")
    held = {name: file for file in weight_files for name in check_safetensors(file)}
    raw = read_json(where)
    config, notes = lifted(raw, where)
    changes = {key: value for key, value in config.items() if raw.get(key) != value}
    changes |= dict.fromkeys(set(raw) - set(config))
    head = HeadTensors.among(held)
    if "tie_word_embeddings" not in raw:
        changes["tie_word_embeddings"] = head is None or head.is_embedding()
    try:
        base, config = load_model(
            path,
            lazy=lazy,
            model_config=changes,
            get_model_classes=model_classes,
            trust_remote_code=trust_remote_code,
        )
    except _CANNOT_LOAD as error:
        raise load_error(path, error) from error
    base.eval()
    if head is not None and not FAMILIES[config["model_type"]].has_head(base) and not head.is_embedding():
        raise InvalidInputError(
            f"{head.place}: differs from the embedding, and the model runs the embedding as its LM head "
            f"(tie_word_embeddings {json.dumps(raw.get('tie_word_embeddings'))} in {where}); set it to false or remove "
            "the tensor"
        )
    evaluate_hidden(base)
    for text in notes:
        note(f"{where}: {text}")
    return base, config


def evaluate_hidden(module: nn.Module) -> None:
    """Evaluate arrays that are no parameters, such as the frequencies of scaled rotary embeddings.

    A lazy array is bound to the stream of the thread that made it, and nothing else evaluates these.
    """
    hidden = [
        value
        for part in module.modules()
        for name, value in (*part.items(), *vars(part).items())
        if name.startswith("_") and isinstance(value, mx.array)
    ]
    mx.eval(hidden)
