"""Models of mlx-lm that are refused: what they keep of the past cannot be taken back token by token."""

RECURRENT = frozenset(
    (
        "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "falcon_h1", "falcon_mamba", "gear",
        "granitemoehybrid", "jamba", "kimi_k3", "kimi_linear", "lfm2", "lfm2-vl", "lfm2_moe", "longcat_flash_ngram",
        "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "plamo2", "prism_hadamard_qwen35", "qwen3_5", "qwen3_5_moe",
        "qwen3_next", "recurrent_gemma", "rwkv7",
    )
)  # fmt: skip
