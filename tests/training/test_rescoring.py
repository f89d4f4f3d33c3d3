"""The rescoring experiment: its figures without a scorer are the validation's, and its features are what they say."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import rescoring
from specstream_mlx.training.batches import Example
from specstream_mlx.training.evaluation import validate
from specstream_mlx.training.loss import LossWeights
from tests.tiny import make_model
from tests.training.training_cases import rows

EXAMPLES = rows(11)


def test_without_a_scorer_the_figures_are_those_of_validation() -> None:
    """Red when: guesses belong to other anchors, or acceptance counts guesses that do not exist."""
    model = make_model("llama", seed=1)
    guesses = rescoring.read_guesses(model, EXAMPLES, batch_size=4)
    found = validate(model, EXAMPLES, LossWeights(0.0), batch_size=4)
    tokens_per_pass, accepted = rescoring.acceptance(guesses)
    assert tokens_per_pass == pytest.approx(found.tokens_per_pass)
    assert accepted == pytest.approx(found.acceptance)
    for kind in rescoring.SCORERS.values():  # which all start as the streams' own ranking
        assert rescoring.acceptance(guesses, kind(model))[0] == pytest.approx(tokens_per_pass)


def test_what_the_text_has_seen_and_what_training_does_with_it() -> None:
    """Red when: a pair is looked up beyond the newest token, under another parent, or the bonus is not learnt."""
    model = make_model("llama", seed=1)
    often, counts = np.unique(rescoring.read_guesses(model, EXAMPLES).tokens, return_counts=True)
    words = often[np.argsort(-counts)[:6]]  # texts of these meet their own pairs again
    rng = np.random.default_rng(0)
    texts = [Example(tuple(rng.choice(words, 9).tolist()), tuple(rng.choice(words, 7).tolist())) for _ in range(6)]
    guesses = rescoring.read_guesses(model, texts)
    number = 0
    for (begin, _, _), example in zip(guesses.answers, texts, strict=True):
        ids = example.prompt + example.answer
        for row in range(len(example.answer) - 1):
            known = ids[: len(example.prompt) + row + 1]
            for j in range(model.gamma):
                place = len(example.prompt) + row + j
                if place + 1 >= len(ids):
                    continue
                assert guesses.parents[begin + row, j] == ids[place]
                assert guesses.targets[begin + row, j] == ids[place + 1]
                for k, candidate in enumerate(guesses.tokens[begin + row, j]):
                    pair, triple = (ids[place], candidate), (ids[place - 1], ids[place], candidate)
                    expected = [pair in itertools.pairwise(known)]
                    expected.append(triple in zip(known, known[1:], known[2:], strict=False))
                    assert guesses.met[begin + row, j, k].tolist() == expected
                    number += expected[0]
    assert number > 5, "nothing was met"
    # A text in which the pair that was met is always right, and the streams do not know it.
    shape = (64, model.gamma, rescoring.CANDIDATES)
    right = np.random.default_rng(0).integers(0, shape[2], shape[:2])
    tokens = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    met = np.repeat((tokens == right[:, :, None]).astype(np.float32)[..., None], 2, axis=-1)
    made = rescoring.Guesses(
        np.zeros((*shape[:2], 1), dtype=np.float32), tokens, np.zeros(shape, dtype=np.float32),
        np.zeros(shape[:2], dtype=np.int32), met, right.astype(np.int32), ((0, 64, 65),),
    )  # fmt: skip
    assert rescoring.acceptance(made)[0] < 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rescoring, "_STEPS", 20)
        scorer = rescoring.fit(rescoring.ContextBonus(model), made)
    assert rescoring.acceptance(made, scorer)[0] == pytest.approx(65 / 14)
    assert mx.all(scorer.bonus > 0).item()
