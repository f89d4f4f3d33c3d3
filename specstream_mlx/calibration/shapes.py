"""Models of well-known shapes with random weights: they cost what such a model costs, and say nothing."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs

from specstream_mlx.drafters.streams.parameters import Streams
from specstream_mlx.errors import UsageError
from specstream_mlx.formats.config import StreamConfig
from specstream_mlx.models.model import SpecStreamModel


def _shape(layers: int, size: int, inner: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-40m": _shape(12, 512, 1408, 8, 8, 4096, True),
    "llama-100m": _shape(12, 768, 2048, 12, 12, 8192, True),
    "llama-1b": _shape(16, 2048, 8192, 32, 8, 128256, True),
    "llama-3b": _shape(28, 3072, 8192, 24, 8, 128256, True),
    "llama-7b": _shape(32, 4096, 11008, 32, 32, 32000, False),
    "llama-8b": _shape(32, 4096, 14336, 32, 8, 128256, False),
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def random_model(name: str, dtype: str, bits: int | None = None, *, gamma: int = 4) -> SpecStreamModel:
    """A model with ``gamma`` streams in the top eighth of its layers, weights drawn at random.

    Raises:
        UsageError: a shape or type that is not known.
    """
    if name not in SHAPES:
        raise UsageError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    args = ModelArgs.from_dict(SHAPES[name])
    base = Model(args)
    base.update(tree_map(lambda value: value.astype(DTYPES[dtype]), base.parameters()))
    if bits is not None:
        nn.quantize(base, group_size=64, bits=bits)
    mx.eval(base.parameters())
    config = StreamConfig.from_dict(
        {
            "gamma": gamma,
            "num_stream_layers": max(args.num_hidden_layers // 8, 1),
            "mode": "shared",
            "stream_id": {"type": "embedding"},
            "stream_init": {"type": "identity"},
            "stream_position": "anchor_plus_j",
            "prune": None,
        }
    )
    streams = Streams(config, args.hidden_size)
    streams.update(tree_map(lambda value: value.astype(DTYPES[dtype]), streams.parameters()))
    base.eval()
    return SpecStreamModel(base, "llama", config, streams)
