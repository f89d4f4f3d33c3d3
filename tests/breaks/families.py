"""Breaks of what single model families need."""

from tests.breaks import Break

BREAKS = (
    Break(
        "the embedding's scale is not rounded as the family's own code rounds it",
        "families.gemma.Gemma3Family.embedding_scale",
        "return _bfloat16(args.hidden_size**0.5)",
        "return args.hidden_size**0.5",
        "test_a_branch_in_a_tree and gemma3_text",
    ),
    Break(
        "logits are not capped",
        "families.gemma.Gemma2Family.logit_cap",
        "return args.final_logit_softcapping",
        "return None",
        "test_a_branch_in_a_tree and gemma2",
    ),
    Break(
        "logits are not scaled",
        "families.cohere.CohereFamily.scale_logits",
        "return logits * args.logit_scale",
        "return logits",
        "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and cohere",
    ),
    Break(
        "learned positions count rows instead of depths",
        "families.learned_positions.LearnedPositions._within_table",
        "np.minimum(positions, length - 1)",
        "np.minimum(positions[0] + np.arange(len(positions)), length - 1)",
        "test_tokens_equal_mlx_lm_in_every_family and (opt or gpt2)",
    ),
    Break(
        "OPT's positions start at the first row of their table",
        "families.models.opt",
        "self.weight[positions + POSITION_OFFSET]",
        "self.weight[positions]",
        "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "post-norm OPT norms before the residual is added",
        "families.models.opt",
        "h = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))",
        "h = x + self.self_attn_layer_norm(self.self_attn(x, mask, cache))",
        "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "padding on the left counts as positions",
        "families.models.opt",
        "mx.maximum(mx.arange(length) + offset[..., None], 0)",
        "mx.arange(length)",
        "test_batches_padded_on_the_left",
    ),
    Break(
        "the table of positions is quantised",
        "families.models.opt",
        '"""Positions counted from 0 -> their rows."""',
        "        pass\n\n    to_quantized = nn.Embedding.to_quantized\n\n    def __call__(self, positions):\n",
        "test_quantised_opt",
    ),
    Break(
        "the text goes on beyond the learned positions",
        "engine.generate.stream_generate",
        "max_tokens = model.tokens_within_context(max_tokens, caches[0].offset + len(ids))",
        "pass",
        "test_text_ends_where_the_positions_end",
    ),
    Break(
        "the text ends one token before the learned positions",
        "target.target.Target.tokens_within_context",
        "left = self.context_length - num_tokens",
        "left = self.context_length - num_tokens - 1",
        "test_text_ends_where_the_positions_end",
    ),
    Break(
        "rotary models end at their context",
        "target.target.Target.tokens_within_context",
        "if self.family.ROTARY or self.context_length is None:",
        "if self.context_length is None:",
        "test_rotary_models_go_on",
    ),
)
