"""Tiny models whose caches mlx can quantise, and how they are quantised."""

WIDE = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}  # the smallest heads mlx can quantise
HEADS = {
    "llama": WIDE,
    "qwen3": WIDE,
    "phi3": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "opt": {"num_attention_heads": 1},
    "gpt2": {"n_head": 1},
}
QUANTISED = {"kv_bits": 4, "kv_group_size": 32}
