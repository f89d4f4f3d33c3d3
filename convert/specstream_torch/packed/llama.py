"""The training forward of a Llama with LoRA and streams on packed rows, in the dtype that multiplies fastest.

LoRA is merged into the weights once per optimiser step, so that the forward is the plain model's, and its gradient
needs four thin products per layer instead of more passes over the activations: for ``y = x (W + s B A)^T``

    dB = s dy^T (x A^T)        dA = s (dy B)^T x        dx = dy (W + s B A)

The residual stream is float32. Streams are a second call of the top ``N_s`` layers, as in `modeling`; a stream row
sees the main keys that its anchor sees and the streams of its anchor up to itself. Shapes: R rows, L tokens,
A anchors, G = gamma, D hidden size, H heads, D_h head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F

from ..modeling import causal_lm
from .packing import PackedBatch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _MergedLinear(torch.autograd.Function):
    """``y = x W^T`` with a merged W; the gradient of W goes to the LoRA factors alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        merged: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.scale = scale
        if a is None or b is None:
            ctx.save_for_backward(merged)
        else:
            ctx.save_for_backward(merged, x, a, b)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        merged, *rest = ctx.saved_tensors
        dx = dy @ merged if ctx.needs_input_grad[0] else None
        if not rest:
            return dx, None, None, None, None
        x, a, b = rest
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        db = (dy.t() @ (x @ low_a.t())).float() * ctx.scale
        da = ((dy @ low_b).t() @ x).float() * ctx.scale
        return dx, None, da, db, None


class _Norm(torch.autograd.Function):
    """RMSNorm of float32 rows with a frozen weight, to the dtype of the products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd * weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        g = dy.float() * weight
        normed = x * rstd
        return rstd * (g - normed * (g * normed).mean(-1, keepdim=True)), None, None, None


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` that keeps its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


class _Projection:
    """One linear layer, with its LoRA merged where it has one."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.lora = isinstance(module, LoraLinear)
        base = module.base_layer if self.lora else module
        self.weight: torch.Tensor = base.weight.detach()
        self.a = module.lora_A["default"].weight if self.lora else None
        self.b = module.lora_B["default"].weight if self.lora else None
        self.scale = float(module.scaling["default"]) if self.lora else 0.0
        self.merged = self.weight.to(dtype, copy=True)

    def refresh(self) -> None:
        """Merge the LoRA as it is now."""
        if self.a is not None and self.b is not None:
            with torch.no_grad():
                self.merged.copy_(torch.addmm(self.weight, self.b, self.a, alpha=self.scale))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        y = _MergedLinear.apply(x.reshape(-1, shape[-1]), self.merged, self.a, self.b, self.scale)
        return y.view(*shape[:-1], -1)


class _Layer:
    """The parts of one block that the forward needs."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.q, self.k, self.v, self.o = (_Projection(getattr(attention, name), dtype) for name in PROJECTIONS[:4])
        self.gate, self.up, self.down = (_Projection(getattr(mlp, name), dtype) for name in PROJECTIONS[4:])
        self.projections = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        self.attention_norm = block.input_layernorm.weight.detach().float()
        self.mlp_norm = block.post_attention_layernorm.weight.detach().float()


class PackedLlama:
    """A Hugging Face Llama with PEFT LoRA, run on packed batches; `refresh` after every optimiser step."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        base = causal_lm(model)
        if base.config.model_type != "llama" or getattr(base.config, "attention_bias", False):
            raise ValueError(
                f"model type {base.config.model_type!r} is not supported here, expected a Llama without biases"
            )
        config = base.config
        self.dtype = dtype
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_kv = config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.layers = [_Layer(block, dtype) for block in base.model.layers]
        self.embedding: torch.Tensor = base.model.embed_tokens.weight.detach()
        self.head: torch.Tensor = base.lm_head.weight.detach().to(dtype)
        self.norm = base.model.norm.weight.detach().float()
        self.rotary = base.model.rotary_emb
        self.first_lora = next((i for i, layer in enumerate(self.layers) if layer.q.lora), len(self.layers))
        self.refresh()

    def refresh(self) -> None:
        """Merge LoRA as it is now."""
        for layer in self.layers:
            for projection in layer.projections:
                projection.refresh()

    def __call__(
        self, batch: PackedBatch, stream_embeddings: torch.Tensor | None, num_stream_layers: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return normed hidden states: the main rows that predict (M, D) and the streams (R, A, G, D)."""
        first_stream = len(self.layers) - num_stream_layers if stream_embeddings is not None else len(self.layers)
        hidden = self.embedding[batch.tokens].float()
        cos, sin = self.angles(batch.positions)
        mask = batch.visible[:, None]
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        trunk = hidden
        for index, layer in enumerate(self.layers):
            if index == first_stream:
                trunk = hidden
            with torch.set_grad_enabled(index >= self.first_lora and torch.is_grad_enabled()):
                q, k, v = self.qkv(layer, hidden, cos, sin)
                if index >= first_stream:
                    kept.append((k, v))
                repeats = q.shape[1] // self.num_kv
                attended = F.scaled_dot_product_attention(
                    q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=mask
                )
                if index == len(self.layers) - 1:  # nothing but the predicting rows is asked for from here on
                    flat = attended.transpose(1, 2).flatten(2).flatten(0, 1)[batch.main_rows]
                    hidden = self.rest(layer, hidden.flatten(0, 1)[batch.main_rows], flat)
                else:
                    hidden = self.rest(layer, hidden, attended.transpose(1, 2).flatten(2))
        main = self.final_norm(hidden)
        if stream_embeddings is None:
            return main, None
        return main, self._streams(batch, trunk, kept, stream_embeddings, first_stream)

    def trunk(self, batch: PackedBatch, num_stream_layers: int) -> torch.Tensor:
        """Return ``M^{N-N_s}`` (R, L, D), without gradients."""
        layer = len(self.layers) - num_stream_layers
        return self.hidden_states(batch, (layer,))[layer]

    def hidden_states(self, batch: PackedBatch, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return ``M^l`` (R, L, D) for every layer wanted, without gradients; N + 1: after the final norm."""
        hidden = self.embedding[batch.tokens].float()
        cos, sin = self.angles(batch.positions)
        states = {0: hidden}
        with torch.no_grad():
            for index, layer in enumerate(self.layers[: max(wanted)], start=1):
                q, k, v = self.qkv(layer, hidden, cos, sin)
                k, v = (x.repeat_interleave(q.shape[1] // self.num_kv, 1) for x in (k, v))
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.visible[:, None])
                hidden = self.rest(layer, hidden, attended.transpose(1, 2).flatten(2))
                states[index] = hidden
            if len(self.layers) + 1 in wanted:
                states[len(self.layers) + 1] = _Norm.apply(hidden, self.norm, self.eps, torch.float32)
        return {index: states[index] for index in wanted}

    def _streams(
        self,
        batch: PackedBatch,
        trunk: torch.Tensor,
        kept: list[tuple[torch.Tensor, torch.Tensor]],
        embeddings: torch.Tensor,
        first_stream: int,
    ) -> torch.Tensor:
        rows, anchors = batch.anchors.shape
        gamma = embeddings.shape[0]
        anchored = trunk.gather(1, batch.anchors[:, :, None].expand(-1, -1, trunk.shape[-1]))
        hidden = (anchored[:, :, None] + embeddings).flatten(1, 2)  # (R, A * G, D)
        offsets = torch.arange(1, gamma + 1, device=hidden.device)
        positions = (batch.positions.gather(1, batch.anchors)[:, :, None] + offsets).flatten(1)
        cos, sin = self.angles(positions)
        length = batch.tokens.shape[1]
        seen = batch.visible.gather(1, batch.anchors[:, :, None].expand(-1, -1, length))  # (R, A, L)
        seen = seen.repeat_interleave(gamma, 1)[:, None]  # (R, 1, A * G, L)
        main_bias = torch.zeros(seen.shape, dtype=self.dtype, device=hidden.device).masked_fill_(~seen, -1e9)
        own = torch.ones(gamma, gamma, dtype=torch.bool, device=hidden.device).tril()
        own_bias = torch.zeros(gamma, gamma, dtype=self.dtype, device=hidden.device).masked_fill_(~own, -1e9)
        for layer, (main_k, main_v) in zip(self.layers[first_stream:], kept, strict=True):
            q, k, v = self.qkv(layer, hidden, cos, sin)
            heads = q.shape[1]
            repeats = heads // self.num_kv
            q = q * self.head_dim**-0.5
            # Heads that share keys are one product of more rows.
            grouped = q.view(rows, self.num_kv, repeats * anchors * gamma, self.head_dim)
            to_main = (grouped @ main_k.transpose(-1, -2)).view(rows, heads, anchors * gamma, length) + main_bias
            per_anchor = (rows, self.num_kv, 1, anchors, gamma, self.head_dim)
            own_q = q.view(rows, self.num_kv, repeats, anchors, gamma, self.head_dim)
            to_own = own_q @ k.view(per_anchor).transpose(-1, -2) + own_bias
            scores = torch.cat((to_main, to_own.reshape(rows, heads, anchors * gamma, gamma)), -1)
            weights = F.softmax(scores, -1, dtype=torch.float32).to(self.dtype)
            main_weights = weights[..., :length].reshape(rows, self.num_kv, repeats * anchors * gamma, length)
            own_weights = weights[..., length:].reshape(rows, self.num_kv, repeats, anchors, gamma, gamma)
            out = (main_weights @ main_v).view(rows, heads, anchors * gamma, self.head_dim)
            out = out + (own_weights @ v.view(per_anchor)).reshape(out.shape)
            hidden = self.rest(layer, hidden, out.transpose(1, 2).flatten(2))
        return self.final_norm(hidden).view(rows, anchors, gamma, -1)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Norm rows for the head."""
        normed: torch.Tensor = _Norm.apply(hidden, self.norm, self.eps, self.dtype)
        return normed

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions (R, L), for all heads."""
        cos, sin = self.rotary(self.embedding[:1, :1], position_ids=positions)
        return cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)

    def qkv(
        self, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed rows to roped queries and keys and values, (R, H, L, D_h)."""
        x = _Norm.apply(hidden, layer.attention_norm, self.eps, self.dtype)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous()
            for projection in (layer.q, layer.k, layer.v)
        )
        return _rope(q, cos, sin), _rope(k, cos, sin), v

    def rest(self, layer: _Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block after its attention: output projection and MLP, both added to the residual stream."""
        hidden = hidden + layer.o(attended)
        x = _Norm.apply(hidden, layer.mlp_norm, self.eps, self.dtype)
        return hidden + layer.down(_SwiGLU.apply(layer.gate(x), layer.up(x)))


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
