"""EAGLE's decoder layer in PyTorch, which is a Llama layer, on packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Pair = tuple[torch.Tensor, torch.Tensor]


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    """Llama's, from rows of ``input_size``."""

    def __init__(self, config: Any, input_size: int) -> None:
        super().__init__()
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.num_kv = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or size // self.num_heads
        self.theta = rope_theta(config)
        self.q_proj = nn.Linear(input_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, size, bias=False)

    def project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(R, L, input_size) -> turned queries and keys, and values, (R, H, L, D_h) each."""
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        steps = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim
        angles = positions[:, None, :, None].float() * self.theta**-steps
        cos, sin = angles.cos(), angles.sin()
        repeats = self.num_heads // self.num_kv
        return turned(q, cos, sin), turned(k, cos, sin).repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)

    def merge(self, attended: torch.Tensor) -> torch.Tensor:
        """(R, H, L, D_h) -> (R, L, D)."""
        out: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of (R, H, L, D_h)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rope_theta(config: Any) -> float:
    """Where transformers keeps it, by version."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def layer_settings(config: Any) -> dict[str, Any]:
    """The settings of ``drafter_config.json`` for a layer of the base's sizes."""
    heads = config.num_attention_heads
    return {
        "intermediate_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope_theta(config),
        "max_position_embeddings": config.max_position_embeddings,
    }


def next_tokens(tokens: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """(R, L) ids shifted to the left; what is shifted in at the end is never used."""
    return torch.cat([tokens[:, steps:], tokens[:, :steps]], 1)
