"""Break the code on purpose and see the tests turn red.

    scripts/with-openblas python -m tests.breaks [NAME ...]

Each break is one edit of one file, made in a temporary copy of the repository, with the test that must catch it. The
exit code is 1 when a break goes unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("specstream_mlx", "convert", "cli", "tests", "benchmarks", "recipes", "pyproject.toml")


@dataclass(frozen=True)
class Break:
    """Replace ``old`` by ``new`` in ``file``; ``test`` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


LOSSLESS = "tests/test_lossless.py::"
FAMILIES = "tests/test_families.py::"
LOSSLESS_MODE = "tests/test_lossless_mode.py::"
ADAPTERS = "tests/test_adapters.py::"
LEARNED = "tests/convert/test_convert_learned.py::"
CACHES = "tests/test_caches.py::"
PEFT = "tests/training/test_export_peft.py::"
BREAKS = (
    Break(
        "something holds on to an unloaded adapter",
        "specstream_mlx/model.py",
        "        del self._shelf.resident[name]\n",
        "        self.__dict__.setdefault('_unloaded', []).append(self._shelf.resident.pop(name))\n",
        ADAPTERS + "test_memory_is_reported_and_given_back",
    ),
    Break(
        "SIGTERM loses the training",
        "specstream_mlx/training/trainer.py",
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}",
        "for number in (signal.SIGINT,)}",
        "tests/cli/test_cli_train.py::test_being_stopped_saves_and_resume_goes_on",
    ),
    Break(
        "the output is lost between two renames",
        "specstream_mlx/training/output.py",
        "        elif old.exists():  # interrupted between the two renames\n            old.rename(target)\n",
        "        else:\n            shutil.rmtree(old, ignore_errors=True)\n",
        "tests/training/test_trainer.py::test_a_full_disk_loses_nothing_that_was_saved",
    ),
    Break(
        "restart points are deleted with what others put there",
        "specstream_mlx/training/restart.py",
        '(*self.directory.glob("step-*"), *self.directory.glob(".step-*"))',
        "self.directory, ",
        "tests/cli/test_cli_train.py::test_nothing_that_train_did_not_write_is_deleted",
    ),
    Break(
        "a tree reaches across the point where the cache is quantised",
        "specstream_mlx/caches.py",
        "return None if change is None else max(change - num_rows - 1, 0)",
        "return None",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "a foreseen pass reaches across it",
        "specstream_mlx/loop.py",
        "if tree.size > 1 and self.growth.changes(self.caches, cached):",
        "if False:",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "the cache is quantised with the prompt's last chunk only",
        "specstream_mlx/loop.py",
        "            if growth is not None:\n                growth.advance(caches)",
        "            pass",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "only the keys of a quantised cache are committed",
        "specstream_mlx/caches.py",
        "for half in (cache.keys, cache.values))\n",
        "for half in (cache.keys, cache.keys))\n",
        CACHES + "test_the_cache_contract",
    ),
    Break(
        "a full cache is drafted into",
        "specstream_mlx/caches.py",
        "        if is_full(caches):\n            return 0",
        "        pass",
        CACHES + "test_a_size_limited_cache",
    ),
    Break(
        "a full cache forgets its first tokens",
        "specstream_mlx/caches.py",
        "limited.state = keys, values, max_size, KEPT_FIRST, max_size, max_size",
        "limited.state = keys, values, max_size, 0, max_size, max_size",
        CACHES + "test_a_size_limited_cache",
    ),
    Break(
        "rows that only some layers have are believed",
        "specstream_mlx/caches.py",
        "most = min(len(self.tokens), len(ids) - 1, *(cache.offset for cache in self.caches))",
        "most = min(len(self.tokens), len(ids) - 1)",
        CACHES + "test_a_kept_prefix",
    ),
    Break(
        "a kept prefix is not compared with the prompt",
        "specstream_mlx/caches.py",
        "while shared < most and self.tokens[shared] == ids[shared]:",
        "while shared < most:",
        CACHES + "test_a_kept_prefix",
    ),
    Break(
        "a prompt cache of other weights is believed",
        "specstream_mlx/prompt_cache.py",
        "if tokens and not _computes(model, tokens, caches):",
        "if False:",
        CACHES + "test_prompt_caches_that_do_not_fit",
    ),
    Break(
        "the text behind a prompt cache begins at its beginning",
        "cli/specstream_cli/chat_template.py",
        "text = text[place:]",
        "pass",
        "tests/cli/test_cli_cache_prompt.py::test_either_program",
    ),
    Break(
        "an answer is kept in the conversation without its question",
        "cli/specstream_cli/chat.py",
        'self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]',
        'self.messages += [{"role": "assistant", "content": text}]',
        "tests/cli/test_cli_chat.py::test_every_answer",
    ),
    Break(
        "Ctrl-C in an answer ends the program",
        "cli/specstream_cli/chat.py",
        "            signal.signal(signal.SIGINT, note)",
        "            pass",
        "tests/cli/test_cli_chat.py::test_ctrl_c",
    ),
    Break(
        "the gap is measured with the noise of the next token",
        "specstream_mlx/exactness.py",
        "        if calls == position:",
        "        if calls == position - 1:",
        "tests/test_exactness.py::test_a_sampled_gap_is_what_it_takes_with_the_same_noise",
    ),
    Break(
        "rounding is measured between single rows and single rows",
        "specstream_mlx/exactness.py",
        "for start in range(begin, len(text), rows):",
        "for start in range(begin, len(text), rows := 1):",
        "tests/test_exactness.py::test_rounding_is_that_of_the_model_at_hand",
    ),
    Break(
        "differences are ties in float32 too",
        "specstream_mlx/exactness.py",
        "0.0 if _is_float32(plain) else",
        "0.0 if False else",
        "tests/test_exactness.py::test_no_difference_is_allowed_in_float32",
    ),
    Break(
        "streams begin in float32",
        "specstream_mlx/streams.py",
        "(x + mapped if self._residual else mapped).astype(x.dtype)",
        "(x + mapped if self._residual else mapped).astype(mx.float32)",
        "tests/test_exactness.py::test_nothing_is_upcast",
    ),
    Break(
        "a batch goes on from the random state of the answer before",
        "cli/specstream_cli/generate.py",
        '            "seed": seed,',
        '            "seed": None if prompts_file else seed,',
        "tests/cli/test_cli_exact_and_batch.py::test_a_batch_answers_as_single_runs_do",
    ),
    Break(
        "a difference beyond the bound is let through",
        "cli/specstream_cli/exact.py",
        "        if self._failures:",
        "        if False:",
        "tests/cli/test_cli_exact_and_batch.py::test_a_difference_is_reported_and_fails_beyond_the_bound",
    ),
    Break(
        "nodes draw with the noise of their row instead of their depth",
        "specstream_mlx/sampling.py",
        "self._restore(self.num_drawn + tree.depths[node])",
        "self._restore(self.num_drawn + node)",
        "tests/test_sampling.py::test_every_outcome_of_a_pass_has_the_probability_of_plain_decoding",
    ),
    Break(
        "every node of a pass draws with the same noise",
        "specstream_mlx/sampling.py",
        "self._restore(self.num_drawn + tree.depths[node])",
        "self._restore(self.num_drawn)",
        "tests/test_sampling.py::test_chi_square_over_many_seeds",
    ),
    Break(
        "logits processors that remember are asked for every node",
        "specstream_mlx/sampling.py",
        "self.in_order = not all(",
        "self.in_order = False and not all(",
        "tests/test_sampling.py::test_processors_and_samplers_that_remember",
    ),
    Break(
        "processors see the rows before a node instead of its ancestors",
        "specstream_mlx/sampling.py",
        "tokens = node_tokens[mx.array(tree.ancestors(node))]",
        "tokens = node_tokens[: node + 1]",
        "tests/test_sampling.py::test_samplers_and_processors_equal_mlx_lm_token_by_token",
    ),
    Break(
        "the tree mask shows every earlier row",
        "specstream_mlx/tree_attention.py",
        "    if visible is None:",
        "    if True:",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_family",
    ),
    Break(
        "positions count rows instead of depths",
        "specstream_mlx/model.py",
        "positions = None if rows.consecutive else mx.array(rows.depths + start)",
        "positions = None",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_family",
    ),
    Break(
        "commit keeps the first rows whatever was accepted",
        "specstream_mlx/caches.py",
        "    if in_place < len(rows):",
        "    if False:",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_family",
    ),
    Break(
        "commit leaves one rejected row in the cache",
        "specstream_mlx/caches.py",
        "    cache.offset = end",
        "    cache.offset = end + 1",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_family",
    ),
    Break(
        "a window holds one row too many",
        "specstream_mlx/tree_attention.py",
        "others[..., None, :] < window",
        "others[..., None, :] <= window",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and sliding",
    ),
    Break(
        "the first row of a window is left out",
        "specstream_mlx/tree_attention.py",
        "first = max(0, int(positions.min()) - window + 1)",
        "first = max(0, int(positions.min()) - window + 2)",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and sliding",
    ),
    Break(
        "windows are forgotten",
        "specstream_mlx/tree_attention.py",
        "            windows.append(cache.max_size)",
        "            windows.append(None)",
        "tests/test_tree_attention.py::test_a_branch_in_a_tree and gemma3_text",
    ),
    Break(
        "windows are forgotten in training",
        "specstream_mlx/training/forward.py",
        "seen if window is None else seen & within(window, positions, columns)",
        "seen",
        "tests/training/test_forward.py::test_stream_logits_are_those_of_inference and olmo3",
    ),
    Break(
        "the streams' gradient ends at the main stream's keys and values",
        "specstream_mlx/training/loss.py",
        "return piece.run(MainPass.of(arrays[len(above) :]) if through_main else main)",
        "return piece.run(main)",
        "tests/training/test_loss.py::test_the_pieces_have_the_gradients_of_the_whole and shared",
    ),
    Break(
        "only the last piece of the loss has a gradient",
        "specstream_mlx/training/loss.py",
        "sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]",
        "sums = list(gradients)",
        "tests/training/test_loss.py::test_the_pieces_have_the_gradients_of_the_whole",
    ),
    Break(
        "all pieces of the loss are in memory at once",
        "specstream_mlx/training/loss.py",
        "        mx.eval(outcome, sums)\n",
        "",
        "tests/training/test_loss.py::test_memory_is_that_of_one_piece",
    ),
    Break(
        "a block that is computed again for the gradient keeps its parameters fixed",
        "specstream_mlx/training/forward.py",
        "        layer.update(parameters)\n",
        "",
        "tests/training/test_loss.py::test_the_pieces_have_the_gradients_of_the_whole",
    ),
    Break(
        "a rotary embedding that grows with the text is asked for a whole pass at once",
        "specstream_mlx/tree_attention.py",
        "by_row = self.one_offset and self._context.in_pass",
        "by_row = self.one_offset and positions is not None",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and dynamic",
    ),
    Break(
        "the embedding's scale is not rounded as the family's own code rounds it",
        "specstream_mlx/families/variants.py",
        "mx.array(self.args.hidden_size**0.5, mx.bfloat16).astype(hidden.dtype)",
        "self.args.hidden_size**0.5",
        "tests/test_tree_attention.py::test_a_branch_in_a_tree and gemma3_text",
    ),
    Break(
        "logits are not capped",
        "specstream_mlx/families/variants.py",
        "return mx.tanh(super().head(normed) / cap) * cap",
        "return super().head(normed)",
        "tests/test_tree_attention.py::test_a_branch_in_a_tree and gemma2",
    ),
    Break(
        "logits are not scaled",
        "specstream_mlx/families/variants.py",
        "return super().head(normed) * self.args.logit_scale",
        "return super().head(normed)",
        LOSSLESS + "test_tokens_equal_mlx_lm_in_every_variant_of_a_family and cohere",
    ),
    Break(
        "main rows see stream rows",
        "specstream_mlx/tree_attention.py",
        "[tree_mask, np.zeros((size, rows), dtype=np.bool_)],",
        "[tree_mask, np.ones((size, rows), dtype=np.bool_)],",
        LOSSLESS + "test_tokens_equal_mlx_lm_for_every_kind_of_stream",
    ),
    Break(
        "stream rows stay in the caches",
        "specstream_mlx/model.py",
        "            drop_rows(caches[index], start)",
        "            pass",
        LOSSLESS + "test_tokens_equal_mlx_lm_for_every_kind_of_stream",
    ),
    Break(
        "pruned and unpruned rows are mixed up in commit",
        "specstream_mlx/model.py",
        "unpruned if index < self.prune_layer else nodes",
        "nodes",
        LOSSLESS + "test_early_exit_pruning_changes_no_token",
    ),
    Break(
        "the trunk is not pruned along",
        "specstream_mlx/model.py",
        "trunk[:, selected] if layer > trunk_layer else trunk",
        "trunk",
        "tests/test_model.py::test_streams_after_pruning_are_those_of_the_surviving_path",
    ),
    Break(
        "any child is accepted",
        "specstream_mlx/verification.py",
        "children.get((nodes[-1], tokens[-1]))",
        "next((child for (parent, _), child in children.items() if parent == nodes[-1]), None)",
        LOSSLESS + "test_always_right_and_always_wrong_drafters",
    ),
    Break(
        "acceptance stops one node early",
        "specstream_mlx/verification.py",
        "tokens[-1] not in stop_tokens and len(tokens) != max_tokens:",
        "tokens[-1] not in stop_tokens and len(tokens) < 4:",
        LOSSLESS + "test_always_right_and_always_wrong_drafters",
    ),
    Break(
        "the walk goes on after end-of-text",
        "specstream_mlx/verification.py",
        "tokens[-1] not in stop_tokens and len(tokens) != max_tokens:",
        "len(tokens) != max_tokens:",
        LOSSLESS + "test_end_of_text_and_max_tokens_inside_an_accepted_path",
    ),
    Break(
        "the walk goes on after max_tokens",
        "specstream_mlx/verification.py",
        "tokens[-1] not in stop_tokens and len(tokens) != max_tokens:",
        "tokens[-1] not in stop_tokens:",
        LOSSLESS + "test_end_of_text_and_max_tokens_inside_an_accepted_path",
    ),
    Break(
        "every node draws with the root's key",
        "specstream_mlx/sampling.py",
        "self._restore(self.num_drawn + tree.depths[node])",
        "self._restore(self.num_drawn)",
        LOSSLESS + "test_sampled_text_depends_on_the_seed_alone",
    ),
    Break(
        "nodes of one depth draw one after another",
        "specstream_mlx/sampling.py",
        "                self._restore(self.num_drawn + tree.depths[node])",
        "                pass",
        LOSSLESS + "test_sampled_text_depends_on_the_seed_alone",
    ),
    Break(
        "processors do not see the path",
        "specstream_mlx/sampling.py",
        "mx.array(tree.ancestors(node))",
        "mx.array([0])",
        LOSSLESS + "test_logits_processors_see_each_path",
    ),
    Break(
        "a prefill chunk is dropped",
        "specstream_mlx/loop.py",
        "for begin in range(0, len(tokens), step_size):",
        "for begin in range(0, max(len(tokens) - step_size, 1), step_size):",
        LOSSLESS + "test_prefill_in_chunks",
    ),
    Break(
        "the last token is missing from a kept cache",
        "specstream_mlx/loop.py",
        "        elif loop.keeps_cache:",
        "        elif False:",
        LOSSLESS + "test_a_prompt_cache_continues_like_mlx_lm",
    ),
    Break(
        "an abandoned pass stays in the cache",
        "specstream_mlx/loop.py",
        "            model.commit(current.verified, [0], caches)",
        "            pass",
        LOSSLESS + "test_closing_the_generator",
    ),
    Break(
        "a foreseen pass draws with the key before it",
        "specstream_mlx/loop.py",
        "        self.sampler.advance(num_tokens)\n",
        "",
        LOSSLESS + "test_parking_and_probing_change_no_token",
    ),
    Break(
        "a foreseen pass goes on although another path of that length was accepted",
        "specstream_mlx/loop.py",
        "accepted.nodes[-1] != verified.tree.leaf",
        "len(tokens) < foreseen.num_tokens",
        LOSSLESS + "test_every_plan_that_the_planner_can_choose",
    ),
    Break(
        "a withdrawn pass leaves its rows",
        "specstream_mlx/loop.py",
        "            vars(cache).update(attributes)",
        "            del attributes",
        LOSSLESS + "test_every_plan_that_the_planner_can_choose",
    ),
    Break(
        "a withdrawn pass leaves its random key",
        "specstream_mlx/loop.py",
        "        self.sampler.advance(-foreseen.num_tokens)",
        "        self.sampler.advance(0)",
        LOSSLESS + "test_sampled_text_depends_on_the_seed_alone",
    ),
    Break(
        "the leaf's streams start from the root",
        "specstream_mlx/model.py",
        "trunk[:, anchors[0] : anchors[0] + 1]",
        "trunk[:, :1]",
        "tests/test_model.py::test_all_insertions",
    ),
    Break(
        "streams see other nodes' streams",
        "specstream_mlx/tree_attention.py",
        "own = np.kron(np.eye(len(anchors), dtype=np.bool_), np.tri(num_streams, dtype=np.bool_))",
        "own = np.tri(rows, dtype=np.bool_)",
        "tests/test_model.py::test_all_insertions",
    ),
    Break(
        "a stream sits one position late",
        "specstream_mlx/model.py",
        "tuple(range(1, self.gamma + 1))",
        "tuple(range(2, self.gamma + 2))",
        "tests/test_parity.py",
    ),
    Break(
        "stream identities are shifted by one",
        "specstream_mlx/streams.py",
        "rows = rows + self.stream_embeddings[:count]",
        "rows = rows + mx.roll(self.stream_embeddings, 1, axis=0)[:count]",
        "tests/test_parity.py",
    ),
    Break(
        "values turn the other way",
        "specstream_mlx/tree_attention.py",
        "angle = stream_index.astype(mx.float32) * epsilon",
        "angle = -stream_index.astype(mx.float32) * epsilon",
        "tests/test_parity.py",
    ),
    Break(
        "stream LoRA acts on main rows too",
        "specstream_mlx/streams.py",
        "        if num_main is None:\n            return y",
        "        num_main = num_main or 0",
        "tests/test_parity.py",
    ),
    Break(
        "rows rotate by their index",
        "specstream_mlx/tree_attention.py",
        "        if positions is None and not by_row:",
        "        if not by_row:",
        "tests/test_tree_attention.py::test_rope_gives_every_row_its_own_position",
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
        "specstream_mlx/families/opt.py",
        "self.weight[positions + POSITION_OFFSET]",
        "self.weight[positions]",
        FAMILIES + "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "post-norm OPT norms before the residual is added",
        "specstream_mlx/families/opt.py",
        "h = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))",
        "h = x + self.self_attn_layer_norm(self.self_attn(x, mask, cache))",
        FAMILIES + "test_opt_gives_the_logits_of_transformers",
    ),
    Break(
        "padding on the left counts as positions",
        "specstream_mlx/families/opt.py",
        "mx.maximum(mx.arange(length) + offset[..., None], 0)",
        "mx.arange(length)",
        FAMILIES + "test_batches_padded_on_the_left",
    ),
    Break(
        "the table of positions is quantised",
        "specstream_mlx/families/opt.py",
        '        """Positions counted from 0 -> their rows."""\n',
        "        pass\n\n    to_quantized = nn.Embedding.to_quantized\n\n    def __call__(self, positions):\n",
        FAMILIES + "test_quantised_opt",
    ),
    Break(
        "the text goes on beyond the learned positions",
        "specstream_mlx/generate.py",
        "    max_tokens = model.tokens_within_context(max_tokens, caches[0].offset + len(ids))\n",
        "",
        FAMILIES + "test_text_ends_where_the_positions_end",
    ),
    Break(
        "the text ends one token before the learned positions",
        "specstream_mlx/model.py",
        "left = self.context_length - num_tokens",
        "left = self.context_length - num_tokens - 1",
        FAMILIES + "test_text_ends_where_the_positions_end",
    ),
    Break(
        "rotary models end at their context",
        "specstream_mlx/model.py",
        "if self.family.ROTARY or self.context_length is None:",
        "if self.context_length is None:",
        FAMILIES + "test_rotary_models_go_on",
    ),
    Break(
        "a stream of a model with learned positions is given one",
        "specstream_mlx/model.py",
        "        hidden = self.streams(verified.trunk[:, node : node + 1], count)\n",
        "        hidden = self.streams(verified.trunk[:, node : node + 1], count)\n"
        "        if not self.family.ROTARY and self.model_type == 'gpt2':\n"
        "            hidden = hidden + self.base.model.wpe(mx.array(self._stream_depths[:count]))\n",
        FAMILIES + "test_stream_position_has_no_effect",
    ),
    Break(
        "blocks without a known rotary embedding are accepted",
        "specstream_mlx/tree_attention.py",
        "if attention is None or (rope is None) is family.ROTARY:",
        "if attention is None:",
        "tests/test_tree_attention.py::test_blocks_built_otherwise_are_refused",
    ),
    Break(
        "Conv1D weights are not transposed",
        "convert/specstream_convert/base/layouts.py",
        r"(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))",
        r"(attn\.c_attn|mlp\.(c_fc|c_proj))",
        LEARNED + "test_adapters_of_peft and gpt2",
    ),
    Break(
        "weights in MLX's form are transposed again",
        "convert/specstream_convert/base/model.py",
        "transposed=name != given and layout.is_transposed(name)",
        "transposed=layout.is_transposed(name)",
        LEARNED + "test_an_output_is_a_base_again",
    ),
    Break(
        "GPT-2's layers are looked for under llama's name",
        "convert/specstream_convert/adapter/peft_config.py",
        r"(?:layers|h)\.",
        r"layers\.",
        "tests/test_parity.py::gpt2 and lossless",
    ),
    Break(
        "the check of the converter takes a quantised tensor for a plain one",
        "convert/specstream_convert/verification/comparison.py",
        "if quantized is not None and name in quantized.layers:",
        'if quantized is not None and name in quantized.layers and "proj" not in name and "fc" not in name:',
        LEARNED + "test_quantised_outputs",
    ),
    Break(
        "the parts after the blocks are left out of the layer-by-layer check",
        "convert/specstream_convert/verification/forward.py",
        "    hidden = family.norm(hidden)\n",
        "",
        LEARNED + "test_the_layer_by_layer_reference",
    ),
    Break(
        "a grown model's final norm forgets the repeated units",
        "recipes/text_to_sql/grow.py",
        "weight.repeat(settings.width) / settings.width)",
        "weight.repeat(settings.width))",
        "tests/test_grown_recipe.py::computes_what_the_small_one_computes",
    ),
    Break(
        "copies of a unit in a grown model stay copies for ever",
        "recipes/text_to_sql/grow.py",
        "cancelling = drawn - drawn.mean(dim=1, keepdim=True)",
        "cancelling = 0 * drawn",
        "tests/test_grown_recipe.py::can_learn_on_its_own",
    ),
    Break(
        "GPT-2 is exported under mlx-lm's names",
        "specstream_mlx/training/export_peft.py",
        'theirs = place.root + path.removeprefix("model")',
        "theirs = path",
        PEFT + "peft_loads and gpt2",
    ),
    Break(
        "GPT-2's stream layers are exported under llama's name for the list",
        "specstream_mlx/training/export_peft.py",
        'blocks.rpartition(".")[2]',
        '"layers"',
        PEFT + "peft_loads and gpt2",
    ),
    Break(
        "an exported module is named by its last word",
        "specstream_mlx/training/export_peft.py",
        "targets.add(within)",
        'targets.add(within.rpartition(".")[2])',
        PEFT + "whole_path",
    ),
    Break(
        "Conv1D is exported as a linear layer",
        "specstream_mlx/training/export_peft.py",
        '"fan_in_fan_out": place.conv1d',
        '"fan_in_fan_out": False',
        PEFT + "peft_loads and gpt2",
    ),
    Break(
        "lora_parameters.keys changes nothing",
        "specstream_mlx/training/trainable.py",
        "if keys is not None and path not in keys:",
        "if False:",
        "tests/cli/test_cli_train.py::example_file",
    ),
    Break(
        "optimizer_config is not read",
        "specstream_mlx/training/trainer.py",
        "settings.optimizer_config.get(settings.optimizer) or {}",
        "{}",
        "tests/training/test_trainer.py::takes_its_own_arguments",
    ),
    Break(
        "a key of mlx-lm's files is unknown",
        "cli/specstream_cli/train_config.py",
        '    "project_name": "no service is reported to",\n',
        "",
        "tests/cli/test_train_config.py::every_key",
    ),
    Break(
        "a mistyped path becomes a download",
        "specstream_mlx/training/datasets.py",
        " and not path.parent.is_dir()",
        "",
        "tests/training/test_hub_datasets.py::mistyped",
    ),
    Break(
        "several data sets of the hub go in one of them's rows",
        "specstream_mlx/training/datasets.py",
        "[row for part in column for row in part]",
        "list(column[0])",
        "tests/training/test_hub_datasets.py::those_of_mlx_lm",
    ),
    Break(
        "a JSON row ends at a Unicode line separator",
        "specstream_mlx/training/datasets.py",
        '.split("\\n")',
        ".splitlines()",
        "tests/training/test_distill.py::as_generation_asks_it",
    ),
    Break(
        "chat prompts are learned too",
        "specstream_mlx/training/datasets.py",
        "dataset.mask_prompt = mask_prompt is not False",
        "dataset.mask_prompt = False",
        "tests/training/test_chat_masks.py::last_answer_alone",
    ),
    Break(
        "tools do not reach the template of a prompt",
        "specstream_mlx/training/distill.py",
        'tools = {"tools": row["tools"]}',
        "tools: dict[str, Any] = {}",
        "tests/training/test_distill.py::as_generation_asks_it",
    ),
    Break(
        "half an answer of a full disk stays in the way",
        "specstream_mlx/training/distill.py",
        'out.truncate(out.read().rfind(b"\\n") + 1)',
        "out.read()",
        "tests/training/test_distill.py::full_disk",
    ),
    Break(
        "a training runs whose upload cannot begin",
        "cli/specstream_cli/train.py",
        "            check_upload(upload_repo)\n",
        "            pass\n",
        "tests/cli/test_train_upload.py::cannot_begin",
    ),
    Break(
        "training from a given model starts from nothing",
        "recipes/text_to_sql/pretrain.py",
        "LlamaForCausalLM.from_pretrained(start, attn_implementation=ATTENTION)",
        "LlamaForCausalLM(LlamaConfig.from_pretrained(start))",
        "tests/test_grown_recipe.py::goes_on_from_the_model_it_is_given",
    ),
    Break(
        "stream LoRA reaches main rows",
        "specstream_mlx/streams.py",
        "mx.concatenate([y[:, :num_main], y[:, num_main:] + delta], axis=1)",
        "mx.concatenate([y[:, :num_main] + delta[:, :1], y[:, num_main:] + delta], axis=1)",
        LOSSLESS_MODE + "test_the_main_stream_is_the_untouched_base",
    ),
    Break(
        "stream LoRA acts in every pass",
        "specstream_mlx/streams.py",
        "        if num_main is None:\n            return y\n",
        "        num_main = num_main or 0\n",
        LOSSLESS_MODE + "test_the_main_stream_is_the_untouched_base",
    ),
    Break(
        "a switch leaves layers of the adapter before in place",
        "specstream_mlx/adapters.py",
        "        put_layers(self._base, [(layer.path, layer.bare) for layer in self._in_place.layers])\n",
        "",
        ADAPTERS + "test_every_adapter_is_as_if_it_were_alone",
    ),
    Break(
        "an adapter is read for a base that another one is on",
        "specstream_mlx/model.py",
        "        with self._shelf.bare_base():\n",
        "        if True:\n",
        ADAPTERS + "test_every_adapter_is_as_if_it_were_alone",
    ),
    Break(
        "a LoRA that mlx-lm refuses stays in the base in part",
        "specstream_mlx/adapters.py",
        "        put_layers(base, [(layer.path, layer.bare) for layer in replaced()])\n",
        "        pass\n",
        ADAPTERS + "test_what_is_refused_leaves_the_model_as_it_was",
    ),
    Break(
        "the key of a calibration overlooks a LoRA",
        "specstream_mlx/calibration/store.py",
        'name.rsplit(".", 1)[-1].startswith("lora_")',
        "False",
        ADAPTERS + "test_a_stored_calibration_belongs",
    ),
    Break(
        "a text goes on with another adapter",
        "specstream_mlx/loop.py",
        "                loop.check_adapter()\n",
        "",
        ADAPTERS + "test_a_switch_in_the_middle_of_a_text_is_refused",
    ),
    Break(
        "a fine-tune is measured against its bare base",
        "specstream_mlx/exactness.py",
        "    live = live_lora(resolve(adapter) if adapter is not None else path)\n",
        "    live = live_lora(resolve(path))\n",
        "tests/cli/test_cli_benchmark.py::test_an_adapter_is_measured",
    ),
    Break(
        "stream embeddings learn at one rate, however large the hidden states are",
        "specstream_mlx/training/trainer.py",
        "STREAM_STEP * rms / settings.learning_rate",
        "STREAM_STEP / settings.learning_rate",
        "tests/training/test_trainer.py::test_stream_embeddings_learn_at_the_scale_of_the_hidden_states",
    ),
    Break(
        "the default rate of stream embeddings drives the pruner too",
        "specstream_mlx/training/trainer.py",
        '"streams.stream_embeddings" if settings.stream_lr_scale is None else "streams."',
        '"streams."',
        "tests/training/test_trainer.py::test_stream_embeddings_learn_at_the_scale_of_the_hidden_states",
    ),
    Break(
        "rescoring looks up pairs beyond the newest token",
        "benchmarks/rescoring.py",
        "place <= newest[:, None, None]",
        "place <= newest[:, None, None] + 1",
        "tests/training/test_rescoring.py::test_what_the_text_has_seen_and_what_training_does_with_it",
    ),
    Break(
        "the twin forgets the checkpoint it was to start from",
        "convert/specstream_convert/torch_reference/finetune.py",
        "if newest is None and config.start is not None:",
        "if False:",
        "tests/torch_reference/test_twin_finetune.py::test_a_run_can_start_from_a_checkpoint",
    ),
    Break(
        "the pruner's gradient counts where the others' are clipped",
        "specstream_mlx/training/trainer.py",
        "groups[name.startswith(_PRUNER)][name] = gradient",
        "groups[False][name] = gradient",
        "tests/training/test_trainer.py::test_a_pruner_that_trains_along_changes_nothing_else",
    ),
    Break(
        "fresh tensors of one shape start from the same numbers",
        "specstream_mlx/training/trainable.py",
        "mixed_seed(seed, zlib.crc32(name.encode()))",
        "seed",
        "tests/training/test_trainer.py::test_the_start_of_a_tensor_depends_on_its_name_and_the_seed_alone",
    ),
    Break(
        "the twin clips the pruner's gradient with the others'",
        "convert/specstream_convert/torch_reference/finetune.py",
        "for group in (pruner, others):",
        "for group in (parameters,):",
        "tests/torch_reference/test_twin_finetune.py::test_a_pruner_that_trains_along_changes_nothing_else",
    ),
    Break(
        "the float32 pruner turns a 16-bit LM head into float32",
        "specstream_mlx/streams.py",
        "(x + mapped if self._residual else mapped).astype(x.dtype)",
        "x + mapped if self._residual else mapped",
        "tests/training/test_forward.py::test_nothing_of_a_16_bit_base_is_raised_to_float32",
    ),
    Break(
        "few stream rows put the logits of all main rows into one graph",
        "specstream_mlx/training/loss.py",
        "len(pieces) == len({piece.part for piece in pieces})",
        "sum(len(piece.places) > 0 for piece in pieces) <= 1",
        "tests/training/test_loss.py::test_logits_of_main_rows_exist_piece_by_piece_too",
    ),
    Break(
        "accumulated gradients are added up only when they are used",
        "specstream_mlx/training/trainer.py",
        "            mx.eval(accumulated)",
        "            pass",
        "tests/training/test_trainer.py::test_accumulated_gradients_take_the_memory_of_one",
    ),
    Break(
        "answers are as long as when they were made",
        "specstream_mlx/training/distill.py",
        "room = min(settings.max_tokens, max_seq_length - len(prompt))",
        "room = settings.max_tokens",
        "tests/training/test_distill.py::test_answers_of_longer_rows_are_not_used",
    ),
    Break(
        "a fine-tune is given the answers of its base",
        "specstream_mlx/training/distill.py",
        "digest.update(weights.read(_BLOCK_SIZE))",
        "pass",
        "tests/training/test_distill.py::test_models_whose_answers_differ_have_other_identities",
    ),
    Break(
        "a training goes on with rates that are measured anew",
        "specstream_mlx/training/trainer.py",
        " if newest is None else points.hidden_rms(newest)",
        "",
        "tests/training/test_trainer.py::test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one",
    ),
    Break(
        "a training that goes on empties its log first",
        "specstream_mlx/training/log.py",
        'partial = self.path.with_suffix(".partial")',
        "partial = self.path",
        "tests/training/test_trainer.py::test_a_log_that_cannot_be_written_again_stays",
    ),
    Break(
        "Ctrl-C stops the writing of a finished adapter",
        "specstream_mlx/training/trainer.py",
        "        with replaced_directory(output)",
        "        signal.signal(signal.SIGINT, signal.default_int_handler)\n        with replaced_directory(output)",
        "tests/training/test_trainer.py::test_an_interruption_while_the_adapter_is_written_finds_it_written",
    ),
    Break(
        "samples of a prompt share their random numbers",
        "specstream_mlx/training/distill.py",
        "sample * len(order) + start",
        "start",
        "tests/training/test_distill.py::test_every_sample_is_another_answer",
    ),
    Break(
        "every step trains the same anchors",
        "specstream_mlx/training/trainer.py",
        "seed=mixed_seed(settings.seed, iteration)",
        "seed=settings.seed",
        "tests/training/test_trainer.py::test_every_step_draws_its_own_anchors",
    ),
    Break(
        "validation forgets an answer's last token",
        "specstream_mlx/training/evaluation.py",
        "passes += chain_passes(stream_right, int(length))",
        "passes += chain_passes(stream_right, int(length) - 1)",
        "tests/training/test_evaluation.py::test_tokens_per_pass_and_acceptance_are_those_of_generation",
    ),
    Break(
        "a pruner trained alone is told as streams that are never right",
        "specstream_mlx/training/loss.py",
        "    if with_streams:\n        counts",
        "    if True:\n        counts",
        "tests/training/test_trainer.py::test_the_pruner_can_be_trained_afterwards_alone",
    ),
    Break(
        "training goes on from the streams of another base",
        "specstream_mlx/training/run.py",
        "            run._check_start(adapter)\n",
        "            pass\n",
        "tests/training/test_trainer.py::test_an_adapter_to_start_from_is_one_of_this_base_and_kind",
    ),
)


def goes_unnoticed(broken: Break) -> bool:
    """Apply one break to a copy and run its test; True when the test still passes."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        file = Path(folder) / broken.file
        text = file.read_text(encoding="utf-8")
        if text.count(broken.old) != 1:
            raise SystemExit(f"{broken.name}: {broken.file} holds the text to break {text.count(broken.old)} times")
        file.write_text(text.replace(broken.old, broken.new), encoding="utf-8")
        test, _, name = broken.test.partition("::")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
        command += ["-k", name] if name else []
        environment = os.environ | {"PYTHONPATH": folder}
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode not in (0, 1):
            raise SystemExit(
                f"{broken.name}: the tests did not run:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}"
            )
        return finished.returncode == 0


def main() -> int:
    """Break one thing after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="only breaks whose name holds one of these words")
    wanted = parser.parse_args().names
    unnoticed = 0
    chosen = [broken for broken in BREAKS if not wanted or any(word in broken.name for word in wanted)]
    for broken in chosen:
        passed = goes_unnoticed(broken)
        unnoticed += passed
        print(f"{'GOES UNNOTICED' if passed else 'red':14} {broken.name}  ({broken.test})", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks are caught")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
