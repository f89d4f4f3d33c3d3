"""EAGLE's layer (arXiv 2401.15077, section 4.2): it learns the target's next feature, and what the LM head makes of it.

``L = smooth_L1(out_i, f_{i+1}) + 0.1 CE(softmax(W f_{i+1}), softmax(W out_i))``; a uniform noise in (-0.1, 0.1) is
added to the features that it reads. EAGLE-2 uses the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .kind import HeadShape
from .layer import MLP, Attention, Norm, layer_settings, next_tokens
from .reading import HeadLoss, Reading, soft_loss

NOISE = 0.1
CLASSIFICATION = 0.1  # weight of what the LM head makes of the features


class EagleLayer(nn.Module):
    """The first layer has no norm at its input."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size)
        self.mlp = MLP(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """(R, L, D) -> (R, L, D)."""
        q, k, v = self.self_attn.project(x, positions)
        x = x + self.self_attn.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None]))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class EagleHead(nn.Module):
    """``fc`` and one layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([EagleLayer(config)])

    def forward(
        self, features: torch.Tensor, embedded: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """(R, L, D) features and embeddings of the tokens after them -> features of those tokens."""
        x = self.fc(torch.cat([embedded, features], -1))
        for layer in self.layers:
            x = layer(x, positions, visible)
        return x


class EagleKind:
    """As ``HeadKind``."""

    name = "eagle"
    whole_rows = True

    def make(self, shape: HeadShape, lm_head: torch.Tensor) -> nn.Module:
        """As ``HeadKind``."""
        return EagleHead(shape.config)

    def taps(self, shape: HeadShape) -> tuple[int, ...]:
        """As ``HeadKind``."""
        return (shape.config.num_hidden_layers + 1,)

    def loss(self, head: nn.Module, reading: Reading, noise: torch.Generator) -> HeadLoss:
        """As ``HeadKind``."""
        (features,) = reading.states.values()
        batch = reading.batch
        drawn = torch.rand(features.shape, generator=noise).to(features.device)
        embedded = reading.embedding[next_tokens(batch.tokens)].float()
        out = head(features + NOISE * (2 * drawn - 1), embedded, batch.positions, batch.visible)
        # Row i stands for the feature of token i + 1, which predicts token i + 2; a prompt's first token has no row.
        learned = batch.main_rows[batch.positions.flatten()[batch.main_rows] > 0]
        guessed, wanted = out.flatten(0, 1)[learned - 1], features.flatten(0, 1)[learned]
        weight = reading.head[reading.vocabulary].float()
        regression = F.smooth_l1_loss(guessed, wanted)
        classification, agreement = soft_loss(guessed @ weight.t(), wanted @ weight.t())
        loss = regression + CLASSIFICATION * classification
        return HeadLoss(loss, [float(regression.detach()), float(classification.detach())], [agreement])

    def settings(self, shape: HeadShape) -> dict[str, Any]:
        """As ``HeadKind``."""
        return layer_settings(shape.config) | {"num_layers": 1, "fc_bias": True, "own_embedding": False}
