"""Rewrites a trained Llama with a smaller residual stream; what it computes stays the same to the bit.

Muon leaves a residual stream of some 30 per coordinate, in which stream embeddings that start at 0.02 would need
thousands of steps to be noticed. Every layer reads the residual stream through an RMS norm, so what is written to
it may be divided by any factor: embedding, `o_proj` and `down_proj` by the factor, epsilon by its square, and the
final norm's weight times the factor, since the tied output layer shares the embedding. A power of two rounds nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .stamps import digest, is_current, write_stamp

FACTOR = 16


@torch.no_grad()  # type: ignore[untyped-decorator]
def divide_residual_stream(model: LlamaForCausalLM, factor: int = FACTOR) -> None:
    """Divide the residual stream of a Llama with tied embeddings by a power of two, in place."""
    if not model.config.tie_word_embeddings or factor < 1 or factor & (factor - 1):
        raise ValueError(f"expected tied embeddings and a power of two, not the factor {factor}")
    epsilon = model.config.rms_norm_eps / factor**2
    model.config.rms_norm_eps = epsilon
    model.model.embed_tokens.weight /= factor
    model.model.norm.weight *= factor
    # The final norm's epsilon is divided too: its input is smaller like every other norm's.
    model.model.norm.variance_epsilon = epsilon
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight /= factor
        layer.mlp.down_proj.weight /= factor
        layer.input_layernorm.variance_epsilon = epsilon
        layer.post_attention_layernorm.variance_epsilon = epsilon


def rescale(base: Path, out: Path) -> Path:
    """Write the rescaled copy of a base directory, unless it is there, and return it."""
    made_from = {"base": digest(base), "factor": FACTOR}
    if is_current(out, made_from):
        return out
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    divide_residual_stream(model)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(base / name, out / name)
    write_stamp(out, made_from)
    return out
