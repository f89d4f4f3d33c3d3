"""What a model family needs beyond stock mlx-lm blocks.

The runtime drives the layers itself and needs four parts of a model: embedding, layers, final norm, LM head. Here is
where each family's parts are found. A family whose embedding is scaled or whose logits are capped gets its own class.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from specstream_mlx.errors import UnsupportedError


class DecoderFamily:
    """Llama-shaped models: ``model.embed_tokens``, ``model.layers``, ``model.norm``, and a tied or own ``lm_head``."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self.layers: Sequence[Any] = base.model.layers

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) ids -> (B, L, D)."""
        return self._base.model.embed_tokens(tokens)

    def norm(self, hidden: mx.array) -> mx.array:
        """The final norm, (B, L, D) -> (B, L, D)."""
        return self._base.model.norm(hidden)

    def head(self, normed: mx.array) -> mx.array:
        """The LM head on normed hidden states, (B, L, D) -> (B, L, V) logits."""
        if self._base.args.tie_word_embeddings:
            return self._base.model.embed_tokens.as_linear(normed)
        return self._base.lm_head(normed)


FAMILIES: dict[str, type[DecoderFamily]] = {
    "llama": DecoderFamily,
    "mistral": DecoderFamily,
    "phi3": DecoderFamily,
    "qwen2": DecoderFamily,
    "qwen3": DecoderFamily,
}


def check_supported(model_type: object, where: str = "model_type") -> None:
    """Refuse families that are not verified here, before any weight is read.

    Raises:
        UnsupportedError: the family is not among ``FAMILIES``.
    """
    if model_type not in FAMILIES:
        raise UnsupportedError(f"{where}: {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def family_of(base: Any, model_type: str) -> DecoderFamily:
    """The family of a loaded mlx-lm model.

    Raises:
        UnsupportedError: the family is not one we have verified.
    """
    check_supported(model_type)
    return FAMILIES[model_type](base)
