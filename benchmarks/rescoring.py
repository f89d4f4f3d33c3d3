"""Rescoring of the streams' candidates by the token picked before them (method section 8): is it worth its price?

Streams do not know which token was picked before them. Here the first ``CANDIDATES`` guesses of stream j get a second
score that does: their parent is the newest token for stream 1, the guess picked from stream j - 1 for stream j.
Three ways, all of which start as the streams' own ranking:

- ``context``: a bonus where parent and candidate, or they and the token before them, have met in the text so far; two
  numbers per stream.
- ``bilinear``: ``(A e_parent) . (B e_candidate)`` of rank 16 over the input embeddings ``e``, which in a tied model are
  the LM head's rows too.
- ``mlp``: ``e_candidate . C silu(A s + B e_parent)`` of rank 16, which sees the stream's hidden state ``s`` too.

They train on detached streams, so with and without are the same streams. On a model's own greedy answers tokens per
pass of chain drafting follow exactly: a guess is only asked for where the tokens before it were right.
``benchmarks.train_ablations`` has what it yields. What it costs in the loop, as a share of a plain step::

    scripts/with-openblas python -m benchmarks.rescoring [--random-weights llama-100m]

Shapes: n anchors, G streams, K candidates, D hidden size.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt

from specstream_mlx import load
from specstream_mlx.calibration.shapes import SHAPES, random_model
from specstream_mlx.drafters.fill import top_candidates
from specstream_mlx.models.model import SpecStreamModel
from specstream_mlx.training.batches import IGNORE, Batch, Example, make_batch
from specstream_mlx.training.evaluation import chain_passes
from specstream_mlx.training.forward import MainPass, forward_main, forward_streams

CANDIDATES = 8
_RANK = 16
_STEPS, _BATCH, _LEARNING_RATE = 1500, 256, 3e-3
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Guesses:
    """What streams guessed at the anchors of some answers.

    Attributes:
        hidden: (n, G, D) after the final norm.
        tokens, logprobs: (n, G, K) candidates in falling order.
        parents: (n, G) the token before each guess.
        met: (n, G, K, 2) whether parent and candidate stand side by side in the text before the guesses, and whether
            the token before them does too.
        targets: (n, G).
        answers: where each answer's anchors begin and end, and how many tokens it has.
    """

    hidden: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    parents: npt.NDArray[np.int32]
    met: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int32]
    answers: tuple[tuple[int, int, int], ...]

    def inputs(self, rows: Any) -> tuple[mx.array, ...]:
        """Of some anchors, what a scorer reads."""
        return tuple(
            mx.array(field[rows]) for field in (self.hidden, self.tokens, self.logprobs, self.parents, self.met)
        )


def children_of(model: SpecStreamModel, example: Example, count: int) -> tuple[MainPass, Any, Any, Any]:
    """The main pass, and of every anchor of an answer: where each guess's parent stands (n, G), ``count`` guesses,
    (n, G) targets.
    """
    batch = make_batch([example], model.gamma)
    main = forward_main(model, mx.array(batch.tokens))
    _, tokens, _ = _candidates(model, batch, main, count)
    places = batch.anchors[0][:, None] + np.arange(1, model.gamma + 1)
    return main, np.minimum(places, len(example) - 1), tokens[0], batch.stream_targets[0]


def _candidates(model: SpecStreamModel, batch: Batch, main: MainPass, count: int) -> list[npt.NDArray[Any]]:
    """(B, A, G, ...) hidden states after the final norm, candidates and their log-probabilities."""
    hidden = model.family.norm(forward_streams(model, main.trunk, main.keys_values, batch.anchors))
    logits = model.family.head(hidden).astype(mx.float32).reshape(-1, model.family.size(vars(model.args), "vocab_size"))
    tokens = top_candidates(logits, count)
    logprobs = mx.take_along_axis(logits, tokens, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    arrays = hidden.astype(mx.float32), tokens, logprobs
    return [np.array(array).reshape(*batch.stream_targets.shape, -1) for array in arrays]


def read_guesses(model: SpecStreamModel, examples: Sequence[Example], batch_size: int = 8) -> Guesses:
    """The guesses at every anchor of some answers."""
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    answers, total = [], 0
    for begin in range(0, len(examples), batch_size):
        chosen = examples[begin : begin + batch_size]
        batch = make_batch(chosen, model.gamma)
        arrays = _candidates(model, batch, forward_main(model, mx.array(batch.tokens)), CANDIDATES)
        for row, example in enumerate(chosen):
            count = max(0, len(example.answer) - 1)
            states, tokens, logprobs = (array[row, :count] for array in arrays)
            ids = np.array(example.prompt + example.answer)
            places = batch.anchors[row, :count, None] + np.arange(1, model.gamma + 1)
            parents, grandparents = (ids[np.minimum(places - back, len(ids) - 1)] for back in (0, 1))
            met = _met(ids, grandparents, parents, tokens, batch.anchors[row, :count] + 1)
            parts.append((states, tokens, logprobs, parents, met, batch.stream_targets[row, :count]))
            answers.append((total, total + count, len(example.answer)))
            total += count
    return Guesses(*(np.concatenate(field) for field in zip(*parts, strict=True)), answers=tuple(answers))  # type: ignore[arg-type]


def _met(ids: Any, grandparents: Any, parents: Any, candidates: Any, newest: Any) -> npt.NDArray[np.float32]:
    """(n, G, K, 2): see ``Guesses.met``; ``newest`` (n,) is the last position that is known at each anchor."""
    base = int(max(ids.max(), candidates.max(initial=0))) + 1
    pairs = ids[:-1].astype(np.int64) * base + ids[1:]
    triples = ids[:-2] * base * base + pairs[1:]
    asked_pairs = parents[:, :, None].astype(np.int64) * base + candidates
    asked_triples = grandparents[:, :, None] * base * base + asked_pairs
    found = [_first(pairs, asked_pairs, 1), _first(triples, asked_triples, 2)]
    return np.stack([place <= newest[:, None, None] for place in found], axis=-1).astype(np.float32)


def _first(keys: Any, asked: Any, end: int) -> npt.NDArray[np.int64]:
    """Where each asked key first ends in the text; never where it does not occur."""
    unique, first = np.unique(keys, return_index=True)
    if not len(unique):
        return np.full(asked.shape, _NEVER)
    places = np.minimum(np.searchsorted(unique, asked), len(unique) - 1)
    return np.where(unique[places] == asked, first[places] + end, _NEVER)


class ContextBonus(nn.Module):
    """Two numbers per stream, added where the text has seen the pair, or the triple."""

    def __init__(self, model: SpecStreamModel) -> None:
        super().__init__()
        self.bonus = mx.zeros((model.gamma, 1, 2))

    def __call__(self, hidden: Any, tokens: Any, logprobs: Any, parents: Any, met: Any) -> mx.array:
        """(n, G, K) scores."""
        return logprobs + (self.bonus * met).sum(axis=-1)


class Bilinear(nn.Module):
    """What parent and candidate say of each other, whatever the stream."""

    def __init__(self, model: SpecStreamModel) -> None:
        super().__init__()
        self._model = model
        size = model.family.size(vars(model.args), "hidden_size")
        self.parent = nn.Linear(size, _RANK, bias=False)
        self.candidate = nn.Linear(size, _RANK, bias=False)
        self.candidate.weight = mx.zeros_like(self.candidate.weight)

    def __call__(self, hidden: Any, tokens: Any, logprobs: Any, parents: Any, met: Any) -> mx.array:
        """(n, G, K) scores."""
        known = self.parent(_embedding(self._model, parents))[:, :, None]
        return logprobs + (known * self.candidate(_embedding(self._model, tokens))).sum(axis=-1)


class MLP(nn.Module):
    """A correction of the stream's hidden state by its parent, read by the embeddings of the candidates."""

    def __init__(self, model: SpecStreamModel) -> None:
        super().__init__()
        self._model = model
        size = model.family.size(vars(model.args), "hidden_size")
        self.stream = nn.Linear(size, _RANK, bias=False)
        self.parent = nn.Linear(size, _RANK, bias=False)
        self.out = nn.Linear(_RANK, size, bias=False)
        self.out.weight = mx.zeros_like(self.out.weight)

    def __call__(self, hidden: Any, tokens: Any, logprobs: Any, parents: Any, met: Any) -> mx.array:
        """(n, G, K) scores."""
        correction = self.out(nn.silu(self.stream(hidden) + self.parent(_embedding(self._model, parents))))
        return logprobs + (correction[:, :, None] * _embedding(self._model, tokens)).sum(axis=-1)


SCORERS = {"context": ContextBonus, "bilinear": Bilinear, "mlp": MLP}


def _embedding(model: SpecStreamModel, tokens: mx.array) -> mx.array:
    """(...) ids -> (..., D) input embeddings."""
    return model.family.embed(tokens.reshape(1, -1), np.zeros(tokens.size, dtype=np.int32)).reshape(*tokens.shape, -1)


def fit(scorer: Any, guesses: Guesses, seed: int = 0) -> Any:
    """Train a scorer where the target is among the candidates."""
    hits = guesses.tokens == guesses.targets[:, :, None]
    among = hits.any(axis=-1)
    rows = np.flatnonzero(among.any(axis=1))
    rng = np.random.default_rng(seed)
    optimizer = optim.Adam(learning_rate=optim.cosine_decay(_LEARNING_RATE, _STEPS), bias_correction=True)

    def loss(scorer: Any, chosen: Any) -> mx.array:
        weights = mx.array(among[chosen].astype(np.float32))
        right = mx.array(hits[chosen].argmax(axis=-1))
        scores = scorer(*guesses.inputs(chosen))
        return (nn.losses.cross_entropy(scores, right, reduction="none") * weights).sum() / weights.sum()

    step = nn.value_and_grad(scorer, loss)
    for _ in range(_STEPS):
        _, gradients = step(scorer, rng.choice(rows, _BATCH))
        optimizer.update(scorer, gradients)
        mx.eval(scorer.parameters(), optimizer.state)
    return scorer


def acceptance(guesses: Guesses, scorer: Any = None) -> tuple[float, list[float]]:
    """Tokens per pass of chain drafting, and (G,) acceptance by depth; without a scorer the streams' own."""
    tokens = passes = 0
    accepted = np.zeros(guesses.targets.shape[1])
    reached = np.zeros_like(accepted)
    for begin, end, length in guesses.answers:
        part = slice(begin, end)
        picked = guesses.tokens[part, :, 0]
        if scorer is not None and end > begin:
            best = np.array(scorer(*guesses.inputs(part)).argmax(axis=-1))
            picked = np.take_along_axis(guesses.tokens[part], best[:, :, None], axis=-1)[:, :, 0]
        right = picked == guesses.targets[part]
        so_far = np.logical_and.accumulate(right, axis=1)
        before = np.concatenate([np.ones_like(so_far[:, :1]), so_far[:, :-1]], axis=1)
        accepted += so_far.sum(axis=0)
        reached += (before & (guesses.targets[part] != IGNORE)).sum(axis=0)
        tokens += length
        passes += chain_passes(right, length)
    return tokens / passes, (accepted / np.maximum(reached, 1)).tolist()


def context_share(model: SpecStreamModel, length: int = 512, repeats: int = 200) -> float:
    """Time of the context bonus for one chain, on the device, over the time of one plain step; medians, in turn.

    It needs no parameters and no host: per stream, ``CANDIDATES`` compared with every pair of the text.
    """
    vocab = model.family.size(vars(model.args), "vocab_size")
    text = mx.random.randint(0, vocab, (length,), key=mx.random.key(0)).astype(mx.int32)
    logits = mx.random.normal((model.gamma, vocab), key=mx.random.key(1))
    caches = model.make_cache()
    mx.eval(model(text[None], cache=caches), logits)

    def chain() -> mx.array:
        candidates = top_candidates(logits, CANDIDATES).astype(mx.int32)
        scores = mx.take_along_axis(logits, candidates, axis=-1)
        tokens = [text[-1]]
        for j in range(model.gamma):
            met = ((text[:-1] == tokens[-1]) & (text[1:] == candidates[j][:, None])).any(axis=-1)
            tokens.append(candidates[j][(scores[j] + met).argmax()])
        return mx.stack(tokens)

    def own() -> mx.array:
        return mx.concatenate([text[-1:], mx.argmax(logits, axis=-1).astype(mx.int32)])

    def step() -> mx.array:
        out: mx.array = model(text[-1:][None], cache=caches)
        for cache in caches:
            cache.trim(1)
        return out

    seconds: dict[str, list[float]] = {"chain": [], "own": [], "step": []}
    for _ in range(repeats):
        for name, run in (("chain", chain), ("own", own), ("step", step)):
            begin = time.perf_counter()
            mx.eval(run())
            seconds[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    return (median["chain"] - median["own"]) / median["step"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the context bonus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--random-weights", choices=sorted(SHAPES), help="a float32 model of this shape, not the bundled"
    )
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(arguments)
    model = random_model(options.random_weights, "float32") if options.random_weights else load()[0]
    share = context_share(model, repeats=options.repeats)
    print(f"context bonus, one chain of {model.gamma} with a text of 512 tokens: {share:.1%} of a plain step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
