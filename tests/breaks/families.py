"""Breaks of what single model families need."""

from tests.breaks import Break

LOSSLESS = "tests/test_lossless.py::"
FAMILIES = "tests/test_families.py::"
BREAKS = (
    Break(
        "the embedding's scale is not rounded as the family's own code rounds it",
        "specstream_mlx/families/gemma.py",
        "return _bfloat16(args.hidden_size**0.5)",
        "return args.hidden_size**0.5",
        "tests/test_tree_attention.py::test_a_branch_in_a_tree and gemma3_text",
    ),
    Break(
        "logits are not capped",
        "specstream_mlx/families/gemma.py",
        "return args.final_logit_softcapping",
        "return None",
        "tests/test_tree_attention.py::test_a_branch_in_a_tree and gemma2",
    ),
    Break(
        "logits are not scaled",
        "specstream_mlx/families/cohere.py",
        "return logits * args.logit_scale",
        "return logits",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and cohere",
    ),
    Break(
        "learned positions count rows instead of depths",
        "specstream_mlx/families/learned_positions.py",
        "np.minimum(positions, length - 1)",
        "np.minimum(positions[0] + np.arange(len(positions)), length - 1)",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_family and (opt or gpt2)",
    ),
    Break(
        "OPT's positions start at the first row of their table",
        "specstream_mlx/families/models/opt.py",
        "self.weight[positions + POSITION_OFFSET]",
        "self.weight[positions]",
        FAMILIES + "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "post-norm OPT norms before the residual is added",
        "specstream_mlx/families/models/opt.py",
        "h = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))",
        "h = x + self.self_attn_layer_norm(self.self_attn(x, mask, cache))",
        FAMILIES + "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "padding on the left counts as positions",
        "specstream_mlx/families/models/opt.py",
        "mx.maximum(mx.arange(length) + offset[..., None], 0)",
        "mx.arange(length)",
        FAMILIES + "test_batches_padded_on_the_left",
    ),
    Break(
        "the table of positions is quantised",
        "specstream_mlx/families/models/opt.py",
        '        """Positions counted from 0 -> their rows."""\n',
        "        pass\n\n    to_quantized = nn.Embedding.to_quantized\n\n    def __call__(self, positions):\n",
        FAMILIES + "test_quantised_opt",
    ),
    Break(
        "the text goes on beyond the learned positions",
        "specstream_mlx/engine/generate.py",
        "    max_tokens = model.tokens_within_context(max_tokens, caches[0].offset + len(ids))\n",
        "",
        FAMILIES + "test_text_ends_where_the_positions_end",
    ),
    Break(
        "the text ends one token before the learned positions",
        "specstream_mlx/models/model.py",
        "left = self.context_length - num_tokens",
        "left = self.context_length - num_tokens - 1",
        FAMILIES + "test_text_ends_where_the_positions_end",
    ),
    Break(
        "rotary models end at their context",
        "specstream_mlx/models/model.py",
        "if self.family.ROTARY or self.context_length is None:",
        "if self.context_length is None:",
        FAMILIES + "test_rotary_models_go_on",
    ),
    Break(
        "a stream of a model with learned positions is given one",
        "specstream_mlx/models/model.py",
        "        hidden = self.streams(verified.trunk[:, node : node + 1], count)\n",
        "        hidden = self.streams(verified.trunk[:, node : node + 1], count)\n"
        "        if not self.family.ROTARY and self.model_type == 'gpt2':\n"
        "            hidden = hidden + self.base.model.wpe(mx.array(self._stream_depths[:count]))\n",
        FAMILIES + "test_stream_position_has_no_effect",
    ),
)
