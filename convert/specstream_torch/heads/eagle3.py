"""EAGLE-3's layer (arXiv 2503.01840): three fused hidden states, and steps of its own in training.

Step ``s`` of row ``i`` reads the row's own output of the step before, with the token that is true there, and sees what
a draft would see: the text's rows up to ``i``, and its own rows of the steps before::

    step 0   rows of the text, features of the target          guess y_{i+2}
    step s   [out_{i,s-1}; e(y_{i+1+s})] at position i + s     guess y_{i+2+s}, sees rows 0..i, (i,1) .. (i,s)

The loss is the cross-entropy with the target's probabilities over the draft vocabulary, ``0.8^s`` of it at step ``s``;
nothing asks the layer to reproduce features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .kind import HeadShape
from .layer import MLP, Attention, Norm, Pair, layer_settings, next_tokens
from .reading import HeadLoss, Reading, soft_loss

DECAY = 0.8  # per step


class Eagle3Layer(nn.Module):
    """Its attention reads an embedding and a feature side by side."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, 2 * size)
        self.mlp = MLP(config)
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (Norm(size, eps) for _ in range(3))

    def forward(
        self,
        features: torch.Tensor,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        kept: list[Pair],
    ) -> torch.Tensor:
        """One step of all rows, (R, L, D) -> (R, L, D); its keys and values are appended to ``kept``."""
        attention = self.self_attn
        joined = torch.cat([self.input_layernorm(embedded), self.hidden_norm(features)], -1)
        q, k, v = attention.project(joined, positions)
        kept.append((k, v))
        scale = attention.head_dim**-0.5
        text_k, text_v = kept[0]
        scores = (q @ text_k.transpose(-1, -2) * scale).masked_fill(~visible[:, None], float("-inf"))
        own = [(q * key).sum(-1, keepdim=True) * scale for key, _ in kept[1:]]
        weights = torch.cat([scores, *own], -1).nan_to_num(neginf=-1e9).softmax(-1)
        length = scores.shape[-1]
        attended = weights[..., :length] @ text_v
        for number, (_, value) in enumerate(kept[1:]):
            attended = attended + weights[..., length + number, None] * value
        x = features + attention.merge(attended)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Eagle3Head(nn.Module):
    """``fc``, one layer, a norm and an LM head over the draft vocabulary; it begins as the base's."""

    def __init__(self, shape: HeadShape, lm_head: torch.Tensor) -> None:
        super().__init__()
        size, config = shape.config.hidden_size, shape.config
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = Norm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, len(shape.draft_vocab), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head[shape.draft_vocab])
        if len(shape.draft_vocab) < config.vocab_size:
            self.register_buffer("d2t", shape.draft_vocab - torch.arange(len(shape.draft_vocab)))
        self.draft_vocab, self.steps = shape.draft_vocab, shape.depth


class Eagle3Kind:
    """As ``HeadKind``."""

    name = "eagle3"
    whole_rows = True

    def make(self, shape: HeadShape, lm_head: torch.Tensor) -> nn.Module:
        """As ``HeadKind``."""
        return Eagle3Head(shape, lm_head)

    def taps(self, shape: HeadShape) -> tuple[int, ...]:
        """As ``HeadKind``: three to fuse, and what the target says."""
        layers = shape.config.num_hidden_layers
        return (*fused_layers(layers), layers + 1)

    def loss(self, head: nn.Module, reading: Reading, noise: torch.Generator) -> HeadLoss:
        """As ``HeadKind``."""
        assert isinstance(head, Eagle3Head)
        batch, last = reading.batch, max(reading.states)
        vocabulary = head.draft_vocab.to(batch.tokens.device)
        features = head.fc(torch.cat([reading.states[tap] for tap in fused_layers(last - 1)], -1))
        final, flat = reading.states[last].flatten(0, 1), batch.positions.flatten()
        weight = reading.head[vocabulary].float()
        kept: list[Pair] = []
        losses, rights = [], []
        for step in range(head.steps):
            embedded = reading.embedding[next_tokens(batch.tokens, step + 1)].float()
            positions = batch.positions + step
            features = head.midlayer(features, embedded, positions, batch.visible, kept)
            # Row i speaks for token i + 1 + step, in whose row the target predicts the next one.
            rows = batch.main_rows - 1 - step
            inside = (rows >= 0) & (flat[rows.clamp(min=0)] + 1 + step == flat[batch.main_rows])
            rows, spoken = rows[inside], batch.main_rows[inside]
            if not len(rows):
                break
            guess = head.lm_head(head.norm(features).flatten(0, 1)[rows])
            loss, right = soft_loss(guess, final[spoken] @ weight.t())
            losses.append(DECAY**step * loss)
            rights.append(right)
        return HeadLoss(torch.stack(losses).sum(), [float(loss.detach()) for loss in losses], rights)

    def settings(self, shape: HeadShape) -> dict[str, Any]:
        """As ``HeadKind``."""
        return layer_settings(shape.config) | {
            "hidden_size": shape.config.hidden_size,
            "draft_vocab_size": len(shape.draft_vocab),
            "taps": list(fused_layers(shape.config.num_hidden_layers)),
            "own_embedding": False,
        }


def fused_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's own choice: below the layers 2, N / 2 and N - 3."""
    return min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)
