"""Breaks of draft heads: what they read, the shift of tokens, the rows of their own caches, their conversion."""

from tests.breaks import Break

GUESSES = "tests/drafters/test_heads.py::test_every_guess_is_that_of_the_formulas"
CONVERTED = "tests/convert/test_convert_heads.py::"
EAGLE = "specstream_mlx/drafters/eagle.py"
BREAKS = (
    Break(
        "Medusa reads the layer below",
        "specstream_mlx/drafters/medusa.py",
        "self.taps = (num_layers,)",
        "self.taps = (num_layers - 1,)",
        GUESSES,
    ),
    Break(
        "Medusa reads before the final norm",
        "specstream_mlx/drafters/medusa.py",
        "x = self._target.family.norm(anchor.passed.taps[tap][:, anchor.node : anchor.node + 1])[0]",
        "x = anchor.passed.taps[tap][:, anchor.node : anchor.node + 1][0]",
        GUESSES,
    ),
    Break(
        "Hydra's heads see the guess without the root",
        "specstream_mlx/drafters/hydra.py",
        "return self.grow(mx.array([0]), anchor.root)",
        "return self.grow(mx.array([0]), anchor.root * 0)",
        GUESSES,
    ),
    Break(
        "Hydra's rows follow the first row of the step before",
        "specstream_mlx/drafters/hydra.py",
        "mx.concatenate([self._seen[parents], embedded], axis=-1)",
        "mx.concatenate([self._seen[parents * 0], embedded], axis=-1)",
        GUESSES,
    ),
    Break(
        "EAGLE pairs a feature with its own token",
        EAGLE,
        "= [prompt[1:]]  # the token after each of those rows",
        "= [prompt[:-1]]  # the token after each of those rows",
        GUESSES,
    ),
    Break(
        "EAGLE keeps the row of a guess",
        EAGLE,
        "            drop_rows(cache, self._num_rows)",
        "            drop_rows(cache, self._num_rows + 1)",
        GUESSES,
    ),
    Break(
        "EAGLE's guesses lie one position too far",
        EAGLE,
        "position = self._position + self._num_rows + self._depth - 1",
        "position = self._position + self._num_rows + self._depth",
        GUESSES,
    ),
    Break(
        "EAGLE's guesses see their siblings",
        EAGLE,
        "mask = None if alone else",
        "mask = None if True else",
        GUESSES,
    ),
    Break(
        "EAGLE takes the first rows of a pass instead of the accepted ones",
        EAGLE,
        "return [part[:, mx.array(list(rows))] for part in tapped]",
        "return [part[:, : len(rows)] for part in tapped]",
        GUESSES,
    ),
    Break(
        "EAGLE-3 fuses other layers",
        EAGLE,
        "(min(2, layers), layers // 2, max(layers - 3, 0))",
        "(min(2, layers), layers // 2, max(layers - 2, 0))",
        GUESSES,
    ),
    Break(
        "EAGLE-3's guesses are not mapped to the target's ids",
        EAGLE,
        'guesses.astype(mx.int32) + self.d2t[guesses] if "d2t" in self else guesses',
        "guesses",
        GUESSES,
    ),
    Break(
        "rows of plain passes are forgotten",
        EAGLE,
        "        self._tapped.append(([taps[layer] for layer in self._drafter.taps], rows))",
        "        self._tapped[:] = [([taps[layer] for layer in self._drafter.taps], rows)]",
        "tests/drafters/test_heads.py::test_a_parked_drafter_goes_on_with_the_whole_text",
    ),
    Break(
        "withdraw leaves the last tokens pending",
        EAGLE,
        "        self._num_rows, self._tapped, self._tokens = self._before",
        "        self._num_rows, self._tapped, _ = self._before",
        "tests/drafters/test_heads.py::test_withdrawn_tokens_leave_nothing_behind",
    ),
    Break(
        "a tree's tokens stay in the order of its depths",
        "specstream_mlx/drafters/growing.py",
        "tokens if tree.is_chain else tokens[plan.order]",
        "tokens",
        GUESSES,
    ),
    Break(
        "EAGLE's embedding and feature are exchanged",
        EAGLE,
        "x = self.fc(mx.concatenate([embedded, features], axis=-1))",
        "x = self.fc(mx.concatenate([features, embedded], axis=-1))",
        CONVERTED + "test_eagle_logits",
    ),
    Break(
        "EAGLE-3's residual is always normed",
        EAGLE,
        "x = normed if self._norm_before_residual else features",
        "x = normed",
        CONVERTED + "test_eagle3_logits",
    ),
    Break(
        "Medusa's heads change places",
        "convert/specstream_convert/heads/plan.py",
        'names[f"{head}.{num_layers}.weight"] = f"heads.{head}.lm_head.weight"',
        'names[f"{head}.{num_layers}.weight"] = f"heads.{num_heads - 1 - head}.lm_head.weight"',
        CONVERTED + "test_medusa_logits",
    ),
    Break(
        "EAGLE's loss compares a row with its own feature",
        "convert/specstream_torch/heads/eagle.py",
        "out.flatten(0, 1)[learned - 1]",
        "out.flatten(0, 1)[learned]",
        "tests/tasks/test_head_training.py::test_a_layer_that_knows_the_next_features_is_always_right",
    ),
    Break(
        "EAGLE-3's steps are held against the tokens of the step before",
        "convert/specstream_torch/heads/eagle3.py",
        "rows = batch.main_rows - 1 - step",
        "rows = batch.main_rows - max(step, 1)",
        "tests/tasks/test_head_training.py::test_a_layer_that_knows_the_next_features_is_always_right",
    ),
    Break(
        "a head counts across the end of an answer",
        "convert/specstream_torch/heads/reading.py",
        "exists = inside & (",
        "exists = inside | (",
        "tests/tasks/test_head_training.py::test_targets_lie_in_the_same_answer",
    ),
)
