"""Tiny random checkpoints of every family, for parity tests and quick trials.

    python -m specstream_torch.testing OUT --family qwen3 --mode lossless

writes ``OUT/base`` (a Hugging Face directory with a character tokenizer) and ``OUT/adapter`` (form A). Nothing is
left at an initial value that would hide a mistake: LoRA's B, the up projections, the norms and the biases are
random and non-zero, the rotary base is not a default, and key/value heads are fewer than query heads where the
family has them. ``opt-post-norm`` and ``opt-projected`` are OPT built as opt-350m is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specstream_mlx.families import CONVERTED

from .checkpoint import add_lora, load_base, save_checkpoint
from .modeling import stream_module
from .streams import MODES, STREAM_POSITIONS, StreamConfig

OPT_VARIANTS: dict[str, dict[str, Any]] = {
    "opt-post-norm": {"do_layer_norm_before": False},
    "opt-projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
}
FAMILIES = (*CONVERTED, *OPT_VARIANTS)
STREAM_INITS = ("identity", "low_rank", "low_rank_residual")


class TinyCheckpoint(NamedTuple):
    """Where a tiny base and its adapter lie."""

    base: Path
    adapter: Path


def make_tiny_checkpoint(
    family: str,
    directory: str | Path,
    *,
    mode: str = "shared",
    gamma: int = 4,
    num_stream_layers: int = 2,
    stream_init: str = "identity",
    stream_position: str = "anchor_plus_j",
    stream_id: str = "embedding",
    epsilon: float = 0.3,
    prune: bool = False,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    form: str = "A",
    rank: int = 4,
    alpha: float = 8.0,
    use_rslora: bool = False,
    hidden_size: int = 64,
    num_layers: int = 4,
    vocab_size: int = 97,
    max_position_embeddings: int = 1024,
) -> TinyCheckpoint:
    """Write a random base and a random adapter under ``directory`` and return their paths.

    ``stream_init`` is ``identity``, ``low_rank`` or ``low_rank_residual`` (rank 3); ``prune`` adds a pruner of
    rank 3.
    """
    if stream_init not in STREAM_INITS:
        raise ValueError(f"stream_init is {stream_init!r}, expected one of {', '.join(STREAM_INITS)}")
    low_rank = stream_init != "identity"
    streams = StreamConfig(
        gamma=gamma,
        num_stream_layers=num_stream_layers,
        mode=mode,
        stream_id=stream_id,
        epsilon=epsilon,
        stream_init="low_rank" if low_rank else "identity",
        init_rank=3 if low_rank else None,
        init_residual=stream_init == "low_rank_residual",
        stream_position=stream_position,
        prune_rank=3 if prune else None,
    )
    paths = TinyCheckpoint(Path(directory) / "base", Path(directory) / "adapter")
    write_tiny_base(
        family,
        paths.base,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        seed=seed,
    )
    model = add_lora(load_base(paths.base), streams, rank=rank, alpha=alpha, use_rslora=use_rslora)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_A." in name:
                _randomise(parameter, parameter.shape[1] ** -0.5, generator)
            elif ".lora_B." in name:
                _randomise(parameter, 0.1, generator)
        for name, parameter in sorted(stream_module(model).named_parameters()):
            _randomise(parameter, 0.5 if name == "stream_embeddings" else parameter.shape[1] ** -0.5, generator)
    save_checkpoint(model, paths.adapter, form=form)
    return paths


def write_tiny_base(
    family: str,
    directory: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 4,
    vocab_size: int = 97,
    max_position_embeddings: int = 1024,
    tie_word_embeddings: bool = False,
    seed: int = 0,
) -> None:
    """Write a random model of a family with ``save_pretrained``, and a character tokenizer beside it."""
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    model_type = "opt" if family in OPT_VARIANTS else family
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings or family == "gpt2",  # GPT-2's head is always its embedding
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "opt":
        settings |= {"ffn_dim": 2 * hidden_size} | OPT_VARIANTS.get(family, {})
    elif model_type != "gpt2":
        settings |= {
            "intermediate_size": 2 * hidden_size,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 30_000.0},
        }
    if family == "qwen3":
        settings["head_dim"] = hidden_size // 2  # the family whose heads need not add up to the hidden size
    if family in ("mistral", "phi3"):
        settings["sliding_window"] = None
    if family == "phi3":
        settings["original_max_position_embeddings"] = max_position_embeddings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("embed_tokens.weight") and not tie_word_embeddings:
                _randomise(parameter, 1.0, generator)
            elif name.endswith(("embed_positions.weight", "wpe.weight")):
                _randomise(parameter, 0.5, generator)
            elif name.endswith(".bias"):
                _randomise(parameter, 0.3, generator)
            elif parameter.ndim == 1:  # norms
                parameter.copy_(1.0 + 0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                _randomise(parameter, parameter.shape[-1] ** -0.5, generator)
    model.save_pretrained(str(directory))
    _character_tokenizer(vocab_size).save_pretrained(str(directory))


def _randomise(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def _character_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, after ``<unk>``, ``<s>`` and ``</s>``."""
    from tokenizers import Tokenizer, decoders, models

    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127))][:vocab_size]
    tokens += [f"<extra_{i}>" for i in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    """Write one tiny checkpoint from the command line."""
    parser = argparse.ArgumentParser(prog="testing", description="Write a tiny random base and a form A adapter.")
    parser.add_argument("directory")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--mode", choices=MODES, default="shared")
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--num-stream-layers", type=int, default=2)
    parser.add_argument("--stream-init", choices=STREAM_INITS, default="identity")
    parser.add_argument("--stream-position", choices=STREAM_POSITIONS, default="anchor_plus_j")
    parser.add_argument("--stream-id", choices=("embedding", "value_rotation"), default="embedding")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--tie-word-embeddings", action="store_true")
    parser.add_argument("--form", choices=("A", "B"), default="A")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    paths = make_tiny_checkpoint(arguments.pop("family"), arguments.pop("directory"), **arguments)
    print(f"{paths.base}\n{paths.adapter}")


if __name__ == "__main__":
    main()
