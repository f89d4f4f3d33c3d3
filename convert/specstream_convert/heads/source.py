"""A directory of published heads: its configuration and tensors, and which kind of head they make.

Names that are known, with ``{i}`` for a number:

    Medusa      medusa_lm_head.safetensors or .pt: {i}.{i}.linear.weight, .bias, {i}.{i}.weight
                or in a whole model's files, below medusa_head.
    EAGLE       model*.safetensors or pytorch_model*.bin: fc.weight, layers.{i}.*, embed_tokens.weight
    EAGLE-3     the same files: fc.weight, midlayer.* (or layers.0.*), norm, lm_head, d2t, t2d
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specstream_convert.files.pickles import Pickles
from specstream_convert.files.shards import open_model_shards
from specstream_convert.files.stored import StoredTensor
from specstream_mlx.errors import InvalidInputError, SpecStreamError
from specstream_mlx.formats.config import read_json
from specstream_mlx.formats.safetensors import TensorFile, open_tensors

MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
MEDUSA_PREFIX = "medusa_head."
MEDUSA_TENSOR = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
# Of a head's configuration and of no model's.
_HINTS = ("medusa_num_heads", "draft_vocab_size", "speculators_model_type", "eagle_config")


@dataclass(frozen=True)
class HeadSource:
    """What was found: ``tensors`` by name, without a wrapper's prefix."""

    directory: Path
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    tensors: dict[str, StoredTensor]

    @property
    def config_path(self) -> Path:
        """Its ``config.json``."""
        return self.directory / "config.json"

    @property
    def kind(self) -> str:
        """The drafter that these tensors make.

        Raises:
            InvalidInputError: none that is known.
        """
        if any(MEDUSA_TENSOR.fullmatch(name) for name in self.tensors):
            return "medusa"
        fc = self.tensors.get("fc.weight")
        if fc is None or len(fc.shape) != 2:
            raise InvalidInputError(
                f"{self.directory}: neither Medusa heads (0.0.linear.weight ...) nor an EAGLE head (fc.weight ...); "
                "give the directory that its authors published"
            )
        q = self.tensors.get("layers.0.self_attn.q_proj.weight")
        wide = q is not None and len(q.shape) == 2 and q.shape[1] == 2 * fc.shape[0]
        third = wide or "d2t" in self.tensors or any(name.startswith("midlayer.") for name in self.tensors)
        return "eagle3" if third else "eagle"


def looks_like_heads(directory: Path) -> bool:
    """Whether a directory seems to hold published heads, without a pickle being opened."""
    if any((directory / name).is_file() for name in MEDUSA_FILES):
        return True
    try:
        config = read_json(directory / "config.json")
        if any(name in config for name in _HINTS):
            return True
        files = open_model_shards(directory)
    except (SpecStreamError, OSError):
        return False
    return any(name.removeprefix("model.") == "fc.weight" for file in files for name in file.tensors)


def open_heads(directory: Path, pickles: Pickles) -> HeadSource:
    """Open a directory of heads; no tensor is read.

    Raises:
        InvalidInputError: nothing there, or damaged files.
        UnsupportedError: pickles, and they are not allowed.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise InvalidInputError(f"{directory}: no such directory; give the directory that holds the heads")
    config = read_json(directory / "config.json")
    medusa = next((directory / name for name in MEDUSA_FILES if (directory / name).is_file()), None)
    if medusa is not None:
        files: tuple[TensorFile, ...] = (
            open_tensors(medusa) if medusa.suffix == ".safetensors" else pickles.open(medusa),
        )
    else:
        files = open_model_shards(directory, pickles)
    held = {name: StoredTensor(file, name) for file in files for name in file.tensors}
    if any(name.startswith(MEDUSA_PREFIX) for name in held):  # in a whole model's files, the rest is its base
        inner = {name: tensor for name, tensor in held.items() if name.startswith(MEDUSA_PREFIX)}
        held = {name.removeprefix(MEDUSA_PREFIX): tensor for name, tensor in inner.items()}
    elif "model.fc.weight" in held:
        held = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    return HeadSource(directory, config, files, held)
