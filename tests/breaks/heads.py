"""Breaks of draft heads: what they read, the shift of tokens, the rows of their own caches."""

from tests.breaks import Break

GUESSES = "test_every_guess_is_that_of_the_formulas"
BREAKS = (
    Break(
        "Medusa reads the layer below",
        "drafters.medusa.Medusa.__init__",
        "self.taps = (num_layers,)",
        "self.taps = (num_layers - 1,)",
        GUESSES,
    ),
    Break(
        "Medusa reads before the final norm",
        "drafters.medusa.MedusaState.marginals",
        "x = self._target.family.norm(anchor.passed.taps[tap][:, anchor.node : anchor.node + 1])[0]",
        "x = anchor.passed.taps[tap][:, anchor.node : anchor.node + 1][0]",
        GUESSES,
    ),
    Break(
        "Hydra's heads see the guess without the root",
        "drafters.hydra.HydraState.start",
        "return self.grow(mx.array([0]), anchor.root)",
        "return self.grow(mx.array([0]), anchor.root * 0)",
        GUESSES,
    ),
    Break(
        "Hydra's rows follow the first row of the step before",
        "drafters.hydra.HydraState.grow",
        "mx.concatenate([self._seen[parents], embedded], axis=-1)",
        "mx.concatenate([self._seen[parents * 0], embedded], axis=-1)",
        GUESSES,
    ),
    Break(
        "EAGLE pairs a feature with its own token",
        "drafters.eagle.EagleState.__init__",
        "= [prompt[1:]]  # the token after each of those rows",
        "= [prompt[:-1]]  # the token after each of those rows",
        GUESSES,
    ),
    Break(
        "EAGLE keeps the row of a guess",
        "drafters.eagle.EagleState.finish",
        "drop_rows(cache, self._num_rows)",
        "drop_rows(cache, self._num_rows + 1)",
        GUESSES,
    ),
    Break(
        "EAGLE's guesses lie one position too far",
        "drafters.eagle.EagleState.grow",
        "position = self._position + self._num_rows + self._depth - 1",
        "position = self._position + self._num_rows + self._depth",
        GUESSES,
    ),
    Break(
        "EAGLE's guesses see their siblings",
        "drafters.eagle.EagleState.grow",
        "mask = None if alone else",
        "mask = None if True else",
        GUESSES,
    ),
    Break(
        "EAGLE takes the first rows of a pass instead of the accepted ones",
        "drafters.eagle._chosen",
        "return [part[:, mx.array(list(rows))] for part in tapped]",
        "return [part[:, : len(rows)] for part in tapped]",
        GUESSES,
    ),
    Break(
        "EAGLE-3 fuses other layers",
        "drafters.eagle.Eagle3.from_settings",
        "(min(2, layers), layers // 2, max(layers - 3, 0))",
        "(min(2, layers), layers // 2, max(layers - 2, 0))",
        GUESSES,
    ),
    Break(
        "EAGLE-3's guesses are not mapped to the target's ids",
        "drafters.eagle.Eagle3Weights.ids",
        'guesses.astype(mx.int32) + self.d2t[guesses] if "d2t" in self else guesses',
        "guesses",
        GUESSES,
    ),
    Break(
        "rows of plain passes are forgotten",
        "drafters.eagle.EagleState.ran",
        "self._tapped.append(([taps[layer] for layer in self._drafter.taps], rows))",
        "self._tapped[:] = [([taps[layer] for layer in self._drafter.taps], rows)]",
        "test_a_parked_drafter_goes_on_with_the_whole_text",
    ),
    Break(
        "withdraw leaves the last tokens pending",
        "drafters.eagle.EagleState.withdraw",
        "self._num_rows, self._tapped, self._tokens = self._before",
        "self._num_rows, self._tapped, _ = self._before",
        "test_withdrawn_tokens_leave_nothing_behind",
    ),
    Break(
        "a tree's tokens stay in the order of its depths",
        "drafters.growing.GrowingState._filled",
        "tokens if tree.is_chain else tokens[plan.order]",
        "tokens",
        GUESSES,
    ),
    Break(
        "EAGLE's embedding and feature are exchanged",
        "drafters.eagle.EagleWeights.__call__",
        "x = self.fc(mx.concatenate([embedded, features], axis=-1))",
        "x = self.fc(mx.concatenate([features, embedded], axis=-1))",
        "test_eagle_logits",
    ),
    Break(
        "EAGLE-3's residual is always normed",
        "drafters.eagle.Eagle3Layer.__call__",
        "x = normed if self._norm_before_residual else features",
        "x = normed",
        "test_eagle3_logits",
    ),
)
