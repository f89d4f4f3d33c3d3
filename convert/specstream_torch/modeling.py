"""The training forward of Speculative Streaming on stock Hugging Face decoder layers.

The main stream never sees a stream, so the two are two calls of the same layers: main rows first, as in the
plain model, and then the stream rows of the top ``N_s`` layers against the main keys and values that the first
call left behind. The numbers are those of one call under the mask

    rows \\ keys |  main 0 1 2 3 | anchor 1: j=1 2 | anchor 2: j=1 2
    main 0       |       x . . . |           . .   |           . .
    main 1       |       x x . . |           . .   |           . .
    main 2       |       x x x . |           . .   |           . .
    main 3       |       x x x x |           . .   |           . .
    stream (1,1) |       x x . . |           x .   |           . .
    stream (1,2) |       x x . . |           x x   |           . .
    stream (2,1) |       x x x . |           . .   |           x .
    stream (2,2) |       x x x . |           . .   |           x x

without stream rows in lower layers, and the main rows are bit for bit the plain model's.
Shapes: B batch, L main rows, A anchors per sequence, D hidden size, V vocabulary. Stream rows lie anchor by
anchor: row ``a * gamma + (j - 1)``. ``M_t^N`` predicts token ``t + 1``, ``S_{t,j}^N`` predicts token ``t + 1 + j``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from specstream_mlx.families import CONVERTED

from .decoder import Decoder, decoder_of
from .streams import SpecStream, StreamConfig, rotate_values

NO_ANCHOR = -1
"""Fills an anchor table (B, A) up to A; the rows it yields are to be ignored."""


@dataclass
class StreamHidden:
    """Hidden states ready for the LM head (after the final norm), and the trunk's, which is not normed."""

    main: torch.Tensor  # (B, L, D)
    streams: torch.Tensor  # (B, A, gamma, D)
    trunk: torch.Tensor  # (B, L, D): M^{N-N_s}


@dataclass
class StreamLogits:
    """Logits of the main stream and of every anchor's streams."""

    main: torch.Tensor  # (B, L, V); row t predicts token t + 1
    streams: torch.Tensor  # (B, A, gamma, V); row (a, j - 1) predicts token t_a + 1 + j
    trunk: torch.Tensor  # (B, L, D): M^{N-N_s}


def attach_streams(model: nn.Module, config: StreamConfig) -> nn.Module:
    """Give a Hugging Face causal LM its ``specstream`` module, in place, and return the model."""
    base = model.config
    if base.model_type not in CONVERTED:
        raise ValueError(f"model type {base.model_type!r} is not supported, expected one of {', '.join(CONVERTED)}")
    if config.num_stream_layers > base.num_hidden_layers:
        raise ValueError(
            f"num_stream_layers is {config.num_stream_layers} but the model has {base.num_hidden_layers} layers"
        )
    if config.prune_rank is not None and config.num_stream_layers == base.num_hidden_layers:
        raise ValueError("a pruner needs a layer below the stream layers; num_stream_layers covers them all")
    model.specstream = SpecStream(base.hidden_size, config).to(next(model.parameters()).device)
    return model


def causal_lm(model: nn.Module) -> Any:
    """Return the Hugging Face model inside an optional PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def stream_module(model: nn.Module) -> SpecStream:
    """Return the live `SpecStream` of a model, PEFT's trained copy when there is one."""
    module = causal_lm(model).specstream
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapters[0]]
    assert isinstance(module, SpecStream)
    return module


def final_norm(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply the base model's final norm; the same one serves main, streams and pruner."""
    return decoder_of(causal_lm(model)).norm(hidden)


def lm_head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Map normed hidden states (..., D) to logits (..., V)."""
    return decoder_of(causal_lm(model)).head(hidden)


def prune_hidden(model: nn.Module, trunk: torch.Tensor) -> torch.Tensor:
    """Return ``final_norm(o(M^{N-N_s}))``, ready for the LM head (the paper's early-exit pruning)."""
    spec = stream_module(model)
    hidden = spec.prune(trunk)
    return final_norm(model, hidden) if spec.config.prune_final_norm else hidden


def stream_mask(anchors: torch.Tensor, num_main: int, gamma: int) -> torch.Tensor:
    """Return what each stream row sees: (B, A * gamma, num_main + A * gamma), True is visible.

    Stream ``j`` at anchor ``t`` sees the main rows up to and including ``t`` and the streams ``1..j`` of its own
    anchor. `NO_ANCHOR` behaves as anchor 0.
    """
    device = anchors.device
    batch, num_anchors = anchors.shape
    sees_main = torch.arange(num_main, device=device) <= anchors.clamp(min=0)[:, :, None]  # (B, A, L)
    sees_main = sees_main.repeat_interleave(gamma, dim=1)
    row = torch.arange(num_anchors * gamma, device=device)
    same_anchor = row[:, None] // gamma == row[None, :] // gamma
    sees_streams = same_anchor & (row[:, None] >= row[None, :])
    return torch.cat((sees_main, sees_streams.expand(batch, -1, -1)), dim=-1)


class _MainKeysValues:
    """Stands where the layers expect a KV cache: keeps main keys and values, shows them to the streams.

    ``append`` False (main call): store and pass through. True (stream call): main rows first, then the streams'
    own; nothing is stored, as a stream's keys and values live for one pass. Gradients flow through both.
    """

    def __init__(self) -> None:
        self.append = False
        self.main: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.append:
            self.main[layer_index] = (keys, values)
            return keys, values
        main_keys, main_values = self.main[layer_index]
        return torch.cat((main_keys, keys), dim=-2), torch.cat((main_values, values), dim=-2)


def forward_hidden(model: nn.Module, input_ids: torch.Tensor, anchors: torch.Tensor) -> StreamHidden:
    """Run main rows and the streams of ``anchors``; the LM head is left to the caller.

    ``input_ids`` (B, L) may be padded on the right: no earlier row sees padding. ``anchors`` (B, A) holds positions
    ``t`` in 0..L-1, filled up with `NO_ANCHOR`. In lossless mode the adapters act on the stream call only and the
    main call records no gradient, since nothing in it is trained.
    """
    base = causal_lm(model)
    decoder = decoder_of(base)
    spec = stream_module(model)
    config = spec.config
    batch, length = input_ids.shape
    _check_runnable(base, decoder, length)
    first_stream_layer = len(decoder.layers) - config.num_stream_layers
    device = input_ids.device
    keys_values = _MainKeysValues()

    with ExitStack() as stack:
        if config.mode == "lossless":
            stack.enter_context(torch.no_grad())
            stack.enter_context(_adapters_off(base))
        positions = torch.arange(length, device=device)[None, :]
        hidden = decoder.embed(input_ids, positions)
        rotary = _rotary(decoder, hidden, positions)
        causal = None  # sdpa is causal without a mask, and faster
        if base.config._attn_implementation == "eager":
            causal = _layer_mask(base, torch.ones(1, length, length, dtype=torch.bool, device=device).tril(), hidden)
        trunk = hidden
        for index, layer in enumerate(decoder.layers):
            if index == first_stream_layer:
                trunk = hidden
            cache = cache_argument(layer, keys_values if index >= first_stream_layer else None)
            hidden = layer(hidden, attention_mask=causal, **cache, **rotary)
        main = decoder.norm(hidden)

    keys_values.append = True
    anchored = trunk.gather(1, anchors.clamp(min=0)[:, :, None].expand(-1, -1, trunk.shape[-1]))
    streams = spec.init_streams(anchored).flatten(1, 2)  # (B, A * gamma, D)
    j = torch.arange(1, config.gamma + 1, device=device)
    offsets = j if config.stream_position == "anchor_plus_j" else torch.zeros_like(j)
    positions = (anchors.clamp(min=0)[:, :, None] + offsets).flatten(1)
    rotary = _rotary(decoder, streams, positions)
    mask = _layer_mask(base, stream_mask(anchors, length, config.gamma), streams)
    top_layers = decoder.layers[first_stream_layer:]
    with ExitStack() as stack:
        if config.stream_id == "value_rotation":
            angles = config.epsilon * j.repeat(anchors.shape[1])
            stack.enter_context(_rotated_values(base.config, decoder, top_layers, angles))
        for layer in top_layers:
            streams = layer(streams, attention_mask=mask, **cache_argument(layer, keys_values), **rotary)
    streams = decoder.norm(streams).view(batch, anchors.shape[1], config.gamma, -1)
    return StreamHidden(main=main, streams=streams, trunk=trunk)


def forward_streams(model: nn.Module, input_ids: torch.Tensor, anchors: torch.Tensor) -> StreamLogits:
    """Run `forward_hidden` and the LM head on every row; training uses the loss module, which asks for fewer."""
    hidden = forward_hidden(model, input_ids, anchors)
    return StreamLogits(lm_head(model, hidden.main), lm_head(model, hidden.streams), hidden.trunk)


def _rotary(decoder: Decoder, hidden: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """What the layers are told of positions: nothing where these were added to the embedding."""
    if decoder.rotary is None:
        return {}
    return {"position_ids": positions, "position_embeddings": decoder.rotary(hidden, position_ids=positions)}


def cache_argument(layer: nn.Module, cache: Any) -> dict[str, Any]:
    """The KV cache as the argument that a decoder layer of the installed transformers takes it by.

    Newer releases call it ``cache``, older ones ``past_key_values``; a wrong name would be dropped in ``**kwargs``.

    Raises:
        TypeError: the layer has neither.
    """
    parameters = inspect.signature(layer.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return {name: cache}
    raise TypeError(
        f"{type(layer).__name__} of transformers {transformers.__version__} takes its KV cache neither as 'cache' nor "
        "as 'past_key_values'; install a release of transformers that this version of specstream-mlx was tested with"
    )


def _check_runnable(base: Any, decoder: Decoder, length: int) -> None:
    """Refuse what would silently give other numbers."""
    attention = base.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attention implementation {attention!r} cannot take a stream mask; use 'sdpa' or 'eager'")
    if base.training and decoder.layers[0].gradient_checkpointing:
        raise ValueError("gradient checkpointing drops the main keys and values; switch it off")
    if decoder.rotary is None and length > base.config.max_position_embeddings:
        raise ValueError(f"{length} tokens, the model has {base.config.max_position_embeddings} learned positions")
    window = getattr(base.config, "sliding_window", None)
    if window is not None and getattr(base.config, "use_sliding_window", True) and length > window:
        raise ValueError(f"{length} tokens exceed the sliding window of {window}, which is not implemented")


def _layer_mask(base: Any, visible: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Turn a boolean (B, rows, keys) into what the layers' attention takes: (B, 1, rows, keys)."""
    visible = visible[:, None]
    if base.config._attn_implementation == "sdpa":
        return visible
    hidden = torch.finfo(like.dtype).min
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, hidden)


@contextmanager
def _adapters_off(base: nn.Module) -> Iterator[None]:
    """Run PEFT's LoRA layers as their base layers; `requires_grad` stays as it is, unlike PEFT's own switch."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@contextmanager
def _rotated_values(config: Any, decoder: Decoder, layers: Sequence[nn.Module], angles: torch.Tensor) -> Iterator[None]:
    """Rotate the value vectors of all rows that pass through ``layers``; ``angles`` (rows,).

    The values are the last ``H_kv * D_h`` outputs of the value projection, fused or not.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        rest, values = output.split((output.shape[-1] - heads * head_dim, heads * head_dim), dim=-1)
        rotated = rotate_values(values.unflatten(-1, (heads, head_dim)), angles).flatten(-2)
        return torch.cat((rest, rotated), dim=-1)

    handles = []
    try:
        for layer in layers:
            handles.append(decoder.value_projection(layer).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
