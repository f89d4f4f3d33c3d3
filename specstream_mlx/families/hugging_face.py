"""A family in Hugging Face's form: names in files and in PEFT's module paths, and the settings that convert exactly.

Llama-shaped models have the same names everywhere. A family that differs says here how raw tensor names become
mlx-lm's and which weights are stored transposed (Conv1D).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class HuggingFace:
    """How transformers writes one family; a family without this is not converted from PyTorch.

    Attributes:
        root: transformers' name of mlx-lm's ``model``.
        bare: the first parts of raw names in files of the inner model, which lack the root.
        conv1d: matches the mlx-lm names of weights that Hugging Face files, where names differ from mlx-lm's, store
            (in, out); they are written (out, in). None where every layer is a plain linear layer.
        ignored: matches raw names that are no parameters, because the model computes them.
        values: the linear layer of a block whose outputs end with the values, as transformers names it.
        rotary: path of the rotary embedding in transformers, where the family has one.
        project_in, project_out: paths of the linear layers around the blocks, in families where a model may have them.
        position_offset: first row of the table of learned positions that stands for a position.
        sizes: integers that ``config.json`` must have.
        epsilons: small numbers that it must have.
        fixed: settings that the MLX model does not read, with the values that it computes; transformers takes the first
            where the setting is absent.
        rope_types: position encodings that mlx-lm computes as transformers does.
        rope_theta: what transformers takes where it is absent; None where that is not the same for every model.
        window: what mlx-lm makes of ``sliding_window``: ignored, or used by the layers that ``layer_types`` says.
            None where this changes nothing that transformers does.
        complete: writes into ``config.json`` what mlx-lm asks for and transformers takes for granted; it is given the
            file's path and returns notes.
    """

    root: str = "model"
    bare: tuple[str, ...] = ()
    conv1d: str | None = None
    ignored: str = r".*\.rotary_emb\.inv_freq"
    values: str = "self_attn.v_proj"
    rotary: str = "model.rotary_emb"
    project_in: str | None = None
    project_out: str | None = None
    position_offset: int = 0
    sizes: tuple[str, ...] = (*SIZES, "intermediate_size")
    epsilons: tuple[str, ...] = ("rms_norm_eps",)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"hidden_act": ("silu", "swish")})
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rope_theta: float | None = 10000.0
    window: Literal["ignored", "by layer"] | None = None
    complete: Callable[[dict[str, Any], Path], list[str]] = lambda config, where: []

    @cached_property
    def _renames(self) -> dict[str, str]:
        """Prefixes of raw names, and what mlx-lm has in their place; the first that fits is used."""
        moved = {} if self.root == "model" else {f"{self.root}.": "model."}
        return moved | {f"{part}.": f"model.{part}." for part in self.bare}

    def name(self, raw: str) -> str:
        """mlx-lm's name of a raw tensor name or of a PEFT module path."""
        for old, new in self._renames.items():
            if raw.startswith(old):
                return new + raw.removeprefix(old)
        return raw

    def path(self, name: str) -> str:
        """Transformers' path of what mlx-lm calls ``name``."""
        return self.root + name.removeprefix("model") if f"{name}.".startswith("model.") else name

    def is_transposed(self, name: str) -> bool:
        """Whether Hugging Face files store the tensor that mlx-lm calls ``name`` as (in, out)."""
        return self.conv1d is not None and re.fullmatch(self.conv1d, name) is not None

    def is_ignored(self, raw: str) -> bool:
        """Whether a raw tensor is no parameter but computed by the model."""
        return re.fullmatch(self.ignored, raw) is not None
