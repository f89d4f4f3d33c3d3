"""The parts of a Hugging Face model that the stream forward needs: embedding, blocks, norm, head.

Where they are is said once, by ``specstream_mlx.families``, for MLX and for PyTorch; it imports no MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from specstream_mlx.families import CONVERTED, FAMILIES
from specstream_mlx.families.decoder import DecoderFamily, at
from specstream_mlx.families.hugging_face import HuggingFace


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal LM. Shapes: B batch, L rows, D hidden size, V vocabulary.

    With learned positions (``rotary`` None) a position counts at the embedding alone, so a stream has none of its
    own: it starts from ``M_t^{N-N_s}``, which carries its anchor's.
    """

    layers: Any  # nn.ModuleList
    layers_name: str  # what PEFT's layers_pattern calls the list
    conv1d: bool  # whether the linear layers of the blocks are Conv1D
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (B, L), positions (1, L) -> (B, L, D)
    norm: Callable[[torch.Tensor], torch.Tensor]  # the final norm, or nothing where there is none
    head: Callable[[torch.Tensor], torch.Tensor]  # normed (..., D) -> logits (..., V)
    rotary: Any | None  # (hidden, position_ids) -> cos and sin
    fingerprint: tuple[str, torch.Tensor] | None  # the last norm's weight under its name in MLX
    value_projection: Callable[[Any], nn.Module]  # of a block; the values are the last of its outputs


def decoder_of(base: Any) -> Decoder:
    """The parts of a Hugging Face causal LM, PEFT's wrapper taken off."""
    family, theirs = FAMILIES[base.config.model_type], CONVERTED[base.config.model_type]
    mark = family.fingerprint_tensor(vars(base.config))
    return Decoder(
        layers=at(base, theirs.path(family.LAYERS)),
        layers_name=family.LAYERS.rpartition(".")[2],
        conv1d=theirs.conv1d is not None,
        embed=partial(_embed, base, family, theirs),
        norm=_part(base, theirs.path(family.NORM)) or (lambda hidden: hidden),
        head=partial(_head, base, family, theirs),
        rotary=at(base, theirs.rotary) if family.ROTARY else None,
        fingerprint=None if mark is None else (mark, base.get_parameter(theirs.path(mark))),
        value_projection=lambda layer: at(layer, theirs.values),
    )


def _embed(
    base: Any, family: type[DecoderFamily], theirs: HuggingFace, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    hidden: torch.Tensor = at(base, theirs.path(family.EMBEDDING))(ids)
    scale = family.embedding_scale(base.config)
    if scale is not None:
        hidden = hidden * scale
    project = theirs.project_in and _part(base, theirs.project_in)
    if project:
        hidden = project(hidden)
    if family.POSITIONS is not None:
        table = at(base, theirs.path(family.POSITIONS))
        hidden = hidden + nn.functional.embedding(positions + theirs.position_offset, table.weight)
    return hidden


def _head(base: Any, family: type[DecoderFamily], theirs: HuggingFace, normed: torch.Tensor) -> torch.Tensor:
    project = theirs.project_out and _part(base, theirs.project_out)
    if project:
        normed = project(normed)
    logits: torch.Tensor = family.scale_logits(base.config, at(base, theirs.path(family.HEAD))(normed))
    cap = family.logit_cap(base.config)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _part(base: Any, path: str) -> Any | None:
    """The module at a path, or None where this model has none."""
    owner, _, name = path.rpartition(".")
    return getattr(at(base, owner), name, None)
