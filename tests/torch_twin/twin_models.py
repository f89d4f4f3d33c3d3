"""Models shared by the tests of the PyTorch twin, and the method written a second time without any economy."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch

from specstream_torch.decoder import decoder_of
from specstream_torch.generate import load_reference
from specstream_torch.modeling import causal_lm, stream_module
from specstream_torch.testing import FAMILIES, TinyCheckpoint, make_tiny_checkpoint
from tests.tolerances import CLOSE_LOGITS

__all__ = ["ATOL", "FAMILIES", "PROMPT", "load", "naive_streams", "tiny"]
PROMPT = [1, 40, 7, 63, 22, 9, 88, 31, 5, 17, 70, 3]
ATOL = CLOSE_LOGITS

_SCRATCH = TemporaryDirectory(prefix="twin-")  # gone when the process ends


@cache
def tiny(family: str, **options: Any) -> TinyCheckpoint:
    """Write a tiny checkpoint once per test run."""
    return make_tiny_checkpoint(family, Path(mkdtemp(dir=_SCRATCH.name)), hidden_size=32, **options)


def load(family: str, attention: str = "sdpa", **options: Any) -> Any:
    """Load a fresh model of a tiny checkpoint."""
    paths = tiny(family, **options)
    return load_reference(paths.base, paths.adapter, attention=attention)


def naive_streams(model: Any, tokens: list[int], anchor: int) -> torch.Tensor:
    """Compute the stream logits (gamma, V) of one anchor as the paper draws it: all rows in one call per layer.

    Main rows and stream rows go through the top layers together under one mask, filled in entry by entry. In
    lossless mode LoRA is gated row by row; the value rotation is a product of complex numbers.
    """
    model.set_attn_implementation("eager")
    base, spec = causal_lm(model), stream_module(model)
    decoder = decoder_of(base)
    config, state = spec.config, dict(spec.state_dict())
    num_main, gamma = anchor + 1, config.gamma
    first = base.config.num_hidden_layers - config.num_stream_layers
    hidden = decoder.embed(torch.tensor([tokens[:num_main]]), torch.arange(num_main)[None])
    main_mask = [[key <= row for key in range(num_main)] for row in range(num_main)]
    positions = list(range(num_main))
    for layer in decoder.layers[:first]:
        hidden = _run(base, layer, hidden, main_mask, positions)

    start = hidden[0, anchor]
    if config.stream_init == "low_rank":
        mapped = state["stream_init.up.weight"] @ (state["stream_init.down.weight"] @ start)
        start = start + mapped if config.init_residual else mapped
    streams = [
        start + state["stream_embeddings"][j - 1] if config.stream_id == "embedding" else start
        for j in range(1, gamma + 1)
    ]
    hidden = torch.cat((hidden, torch.stack(streams)[None]), dim=1)
    mask = [row + [False] * gamma for row in main_mask]
    mask += [[True] * num_main + [i <= j for i in range(1, gamma + 1)] for j in range(1, gamma + 1)]
    positions += [anchor + j if config.stream_position == "anchor_plus_j" else anchor for j in range(1, gamma + 1)]
    hooks = _row_hooks(base, first, num_main)
    for layer in decoder.layers[first:]:
        hidden = _run(base, layer, hidden, mask, positions)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    return decoder.head(decoder.norm(hidden))[0, num_main:]


def _run(base: Any, layer: Any, hidden: torch.Tensor, mask: list[list[bool]], positions: list[int]) -> torch.Tensor:
    ids = torch.tensor([positions])
    additive = torch.tensor([[0.0 if seen else float("-inf") for seen in row] for row in mask])[None, None]
    rotary = decoder_of(base).rotary
    if rotary is None:  # the main rows have their positions from the embedding, the streams their anchor's
        return layer(hidden, attention_mask=additive)
    return layer(
        hidden, attention_mask=additive, position_ids=ids, position_embeddings=rotary(hidden, position_ids=ids)
    )


def _row_hooks(base: Any, first: int, num_main: int) -> list[Any]:
    """Gate LoRA to the stream rows (lossless), then rotate the stream rows' values (value_rotation)."""
    config = stream_module(base).config
    decoder = decoder_of(base)
    hooks = []
    for layer in decoder.layers[first:]:
        if config.mode == "lossless":
            for module in layer.modules():
                if hasattr(module, "lora_A"):
                    hooks.append(
                        module.register_forward_hook(
                            lambda m, x, y: torch.cat(
                                (m.base_layer(x[0])[..., :num_main, :], y[..., num_main:, :]), dim=-2
                            )
                        )
                    )
        if config.stream_id == "value_rotation":
            attention = layer.attn if base.config.model_type == "gpt2" else layer.self_attn
            projection = decoder.value_projection(layer)
            heads = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
            width = heads * attention.head_dim

            def rotate(_m: Any, _x: Any, y: torch.Tensor, width: int = width, size: int = attention.head_dim) -> Any:
                y = y.clone()
                for j in range(1, config.gamma + 1):
                    real, imaginary = y[0, num_main + j - 1, -width:].view(-1, size).chunk(2, dim=-1)
                    turned = torch.complex(real, imaginary) * torch.exp(torch.tensor(1j * config.epsilon * j))
                    y[0, num_main + j - 1, -width:] = torch.cat((turned.real, turned.imag), dim=-1).flatten()
                return y

            hooks.append(projection.register_forward_hook(rotate))
    return hooks
