"""Where each family of Hugging Face models keeps what the stream forward needs: embedding, blocks, norm, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2")


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal LM. Shapes: B batch, L rows, D hidden size, V vocabulary.

    With learned positions (``rotary`` None) a position counts at the embedding alone, so a stream has none of its
    own: it starts from ``M_t^{N-N_s}``, which carries its anchor's.
    """

    layers: Any  # nn.ModuleList
    layers_name: str  # what PEFT's layers_pattern calls the list
    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (B, L), positions (1, L) -> (B, L, D)
    norm: Callable[[torch.Tensor], torch.Tensor]  # the final norm, or nothing where there is none
    head: Callable[[torch.Tensor], torch.Tensor]  # normed (..., D) -> logits (..., V)
    rotary: Any | None  # (hidden, position_ids) -> cos and sin
    fingerprint: tuple[str, torch.Tensor] | None  # the last norm's weight under its name in MLX
    value_projection: Callable[[Any], nn.Module]  # of a block; the values are the last of its outputs


def decoder_of(base: Any) -> Decoder:
    """The parts of a Hugging Face causal LM, PEFT's wrapper taken off."""
    return {"opt": _opt, "gpt2": _gpt2}.get(base.config.model_type, _llama)(base)


def _llama(base: Any) -> Decoder:
    inner = base.model
    return Decoder(
        layers=inner.layers,
        layers_name="layers",
        embed=lambda ids, _: inner.embed_tokens(ids),
        norm=inner.norm,
        head=base.lm_head,
        rotary=inner.rotary_emb,
        fingerprint=("model.norm.weight", inner.norm.weight),
        value_projection=lambda layer: getattr(layer.self_attn, "v_proj", None) or layer.self_attn.qkv_proj,
    )


def _opt(base: Any) -> Decoder:
    inner = base.model.decoder

    def embed(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = inner.embed_tokens(ids)
        if inner.project_in is not None:
            hidden = inner.project_in(hidden)
        return hidden + inner.embed_positions(None, position_ids=positions)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return base.lm_head(hidden if inner.project_out is None else inner.project_out(hidden))

    name, last = "model.decoder.final_layer_norm", inner.final_layer_norm
    if last is None:
        name, last = f"model.decoder.layers.{len(inner.layers) - 1}.final_layer_norm", inner.layers[-1].final_layer_norm
    return Decoder(
        layers=inner.layers,
        layers_name="layers",
        embed=embed,
        norm=inner.final_layer_norm or (lambda hidden: hidden),
        head=head,
        rotary=None,
        fingerprint=None if last.weight is None else (f"{name}.weight", last.weight),
        value_projection=lambda layer: layer.self_attn.v_proj,
    )


def _gpt2(base: Any) -> Decoder:
    inner = base.transformer
    return Decoder(
        layers=inner.h,
        layers_name="h",
        embed=lambda ids, positions: inner.wte(ids) + inner.wpe(positions),
        norm=inner.ln_f,
        head=base.lm_head,
        rotary=None,
        fingerprint=("model.ln_f.weight", inner.ln_f.weight),
        value_projection=lambda layer: layer.attn.c_attn,
    )
