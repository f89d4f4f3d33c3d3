"""Medusa's, Hydra's and EAGLE's forward passes in PyTorch, written from the papers: whole texts, no cache, no tree.

Tensors have the names of the published checkpoints, which for EAGLE are also ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


def medusa(tensors: Tensors, num_heads: int, num_layers: int, hidden: torch.Tensor) -> torch.Tensor:
    """(..., D) hidden states after the final norm -> (num_heads, ..., V) logits."""
    out = []
    for head in range(num_heads):
        x = hidden
        for layer in range(num_layers):
            block = f"{head}.{layer}.linear"
            x = x + F.silu(F.linear(x, tensors[f"{block}.weight"], tensors[f"{block}.bias"]))
        out.append(F.linear(x, tensors[f"{head}.{num_layers}.weight"]))
    return torch.stack(out)


def hydra(tensors: Tensors, num_layers: int, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """The logits of head ``k`` from (D,) and the (k, D) embeddings of the root and the guesses, under our names."""
    head = f"heads.{len(embedded) - 1}"
    z = torch.cat([hidden, embedded.flatten()])
    x = F.linear(z, tensors[f"{head}.merge.residual.weight"], tensors[f"{head}.merge.residual.bias"])
    x = x + F.silu(F.linear(z, tensors[f"{head}.merge.linear.weight"], tensors[f"{head}.merge.linear.bias"]))
    for layer in range(num_layers - 1):
        block = f"{head}.blocks.{layer}.linear"
        x = x + F.silu(F.linear(x, tensors[f"{block}.weight"], tensors[f"{block}.bias"]))
    return F.linear(x, tensors[f"{head}.lm_head.weight"])


def eagle(tensors: Tensors, config: Mapping[str, Any], features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """(L, D) features and embeddings of the tokens after them -> (L, D) features of those tokens."""
    x = F.linear(torch.cat([embedded, features], -1), tensors["fc.weight"], tensors.get("fc.bias"))
    for layer in range(config.get("num_layers", 1)):
        name = f"layers.{layer}"
        normed = x if layer == 0 else _norm(x, tensors[f"{name}.input_layernorm.weight"], config)
        x = x + _attention(tensors, f"{name}.self_attn", config, normed)
        x = x + _mlp(tensors, f"{name}.mlp", _norm(x, tensors[f"{name}.post_attention_layernorm.weight"], config))
    return x


def eagle3(tensors: Tensors, config: Mapping[str, Any], features: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """As ``eagle``, from features that went through ``fc`` or came out of the layer."""
    normed = _norm(features, tensors["midlayer.hidden_norm.weight"], config)
    joined = torch.cat([_norm(embedded, tensors["midlayer.input_layernorm.weight"], config), normed], -1)
    x = normed if config.get("norm_before_residual") else features
    x = x + _attention(tensors, "midlayer.self_attn", config, joined)
    return x + _mlp(tensors, "midlayer.mlp", _norm(x, tensors["midlayer.post_attention_layernorm.weight"], config))


def eagle3_logits(tensors: Tensors, config: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """(L, D) -> (L, draft vocabulary)."""
    return F.linear(_norm(hidden, tensors["norm.weight"], config), tensors["lm_head.weight"])


def _norm(x: torch.Tensor, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.get("rms_norm_eps", 1e-6))


def _mlp(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _attention(tensors: Tensors, name: str, config: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    size, heads = config["head_dim"], config["num_heads"]

    def project(part: str) -> torch.Tensor:
        rows = F.linear(x, tensors[f"{name}.{part}_proj.weight"], tensors.get(f"{name}.{part}_proj.bias"))
        return rows.view(len(x), -1, size).transpose(0, 1)

    frequencies = config.get("rope_theta", 10000.0) ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(len(x))[:, None] * frequencies / config.get("rope_factor", 1.0)
    cos, sin = angles.cos(), angles.sin()

    def turn(rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    q, k, v = turn(project("q")), turn(project("k")), project("v")
    k, v = (rows.repeat_interleave(heads // len(rows), 0) for rows in (k, v))
    scores = (q @ k.transpose(-1, -2)) / size**0.5
    scores = scores.masked_fill(~torch.ones(len(x), len(x), dtype=torch.bool).tril(), float("-inf"))
    return F.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), tensors[f"{name}.o_proj.weight"])
