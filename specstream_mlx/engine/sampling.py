"""The target's draw at every node of a tree, exactly as plain decoding would make it (method section 5).

mlx-lm's samplers take their noise from the global random key, which every draw moves one or more steps along a chain
of splits. The noise of the i-th generated token is therefore a function of (seed, i) alone, and a node of depth ``g``
draws with the key of token ``i + g``. All nodes of a depth share it: at most one of them is on the accepted path.
The same seed thus gives the same text with speculation on or off, whatever the tree, and the text of mlx-lm itself.
A sequence has a chain of its own: the key of the thread is put back after every draw, so sequences that are decoded
in turn, or in several threads, take no noise from one another.

mlx-lm's own samplers and logits processors depend on their arguments alone, so they may be asked at every node of the
tree at once. Any other may remember what it was asked (a grammar, a generator of its own), and nobody could take that
back: it is asked along the accepted path only, once per generated token and in order, as plain decoding asks.
"""

import math
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx_lm import sample_utils
from mlx_lm.sample_utils import greedy_sampler

from specstream_mlx.engine.acceptance import accept
from specstream_mlx.target.tree import DraftTree

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
Key = tuple[int, int]

_KEYS_PER_SPLIT_BATCH = 64
_MAX_SPLITS_PER_DRAW = 16
_WORD = 0xFFFFFFFF
_SPLITS: "WeakKeyDictionary[Sampler, int]" = WeakKeyDictionary()  # by sampler: it is asked once for each


@dataclass(frozen=True, eq=False)
class Drawn:
    """The target's tokens after the nodes of a tree.

    Attributes:
        tokens: (T,) ids; -1 at nodes off the accepted path where draws are made in order.
        rows: log-probabilities that they were drawn from: (T, V), or (1, V) by node.
    """

    tokens: mx.array
    rows: mx.array | Mapping[int, mx.array]

    def logprobs(self, node: int) -> mx.array:
        """(V,) log-probabilities after a node, after the logits processors, as mlx-lm gives them."""
        return self.rows[node] if isinstance(self.rows, mx.array) else self.rows[node][0]


class TargetSampler:
    """Draws tokens from target logits, keeping track of which random key belongs to which generated token.

    Attributes:
        in_order: whether it may be asked for a token only once the one before it is certain.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        logits_processors: Sequence[LogitsProcessor] | None,
        vocab_size: int,
        seed: int | None = None,
        *,
        max_tokens: int = -1,
        stop_tokens: Container[int] = (),
    ) -> None:
        """Prepare the key chain.

        Args:
            sampler: (1, V) log-probabilities -> (1,) ids; None: greedy.
            logits_processors: (S,) ids along the path and (1, V) logits -> (1, V) logits.
            vocab_size: V.
            seed: None goes on from the random state of this thread, as mlx-lm does, unless nothing has seeded it.
            max_tokens, stop_tokens: where the text ends, after which samplers that remember are not asked any more.
        """
        self.sampler = None if sampler is greedy_sampler else sampler
        self.processors = list(logits_processors or ())
        self.num_drawn = 0
        self._max_tokens = max_tokens
        self._stop_tokens = stop_tokens
        self.in_order = not all(map(_is_pure, (*self.processors, self.sampler or greedy_sampler)))
        self._chain = _KeyChain(seed) if self.sampler is not None or self.in_order else None
        self._splits = 0
        if self.sampler is not None and not self.in_order:
            self._splits = _splits_per_draw(self.sampler, vocab_size)

    def draw(self, logits: mx.array, tree: DraftTree, node_tokens: mx.array, history: mx.array | None) -> Drawn:
        """The target's token after every node.

        Args:
            logits: (T, V), row i predicts the token after node i.
            tree: the verified tree, T nodes.
            node_tokens: (T,) ids.
            history: (S,) ids before the root, given to the logits processors; None when there are none.
        """
        if self.sampler is None and not self.processors:
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return Drawn(greedy_sampler(logprobs), logprobs)
        rows: dict[int, mx.array] = {}

        def draw_at(node: int) -> mx.array:
            row = logits[node : node + 1]
            if self.processors:
                tokens = node_tokens[mx.array(tree.ancestors(node))]
                if history is not None:
                    tokens = mx.concatenate([history, tokens])
                for processor in self.processors:
                    row = processor(tokens, row)
            rows[node] = row - mx.logsumexp(row, keepdims=True)
            if self._splits and self._chain is not None:
                self._chain.restore((self.num_drawn + tree.depths[node]) * self._splits)
            return (self.sampler or greedy_sampler)(rows[node])

        with self._chain.own() if self._chain is not None else nullcontext():
            if not self.in_order or tree.size == 1:
                return Drawn(mx.concatenate([draw_at(node) for node in range(tree.size)]), rows)
            drawn = _OnDemand(draw_at)
            remaining = None if self._max_tokens == -1 else self._max_tokens - self.num_drawn
            ids: list[int] = node_tokens.tolist()  # type: ignore[assignment]
            accept(tree, ids, drawn, max_tokens=remaining, stop_tokens=self._stop_tokens)
            return Drawn(mx.array([drawn.get(node, -1) for node in range(tree.size)]), rows)

    def advance(self, num_tokens: int) -> None:
        """Record that ``num_tokens`` draws were kept; the next root draws with the key after them."""
        self.num_drawn += num_tokens

    def finish(self) -> None:
        """Leave the random state of this thread as plain decoding leaves it, unless somebody else has moved it."""
        if self._chain is not None:
            self._chain.finish(self.num_drawn * self._splits if self._splits else None)


class _KeyChain:
    """The random keys of one sequence: each draw splits the current one and goes on with the first half."""

    def __init__(self, seed: int | None) -> None:
        self._claim: Key | None = None  # what the thread's key was set to, so that no other sequence starts from ours
        if seed is not None:
            start = seed >> 32 & _WORD, seed & _WORD
        elif (start := _thread_key()) == _never_seeded():
            start = _words(os.urandom(8))
        else:
            self._claim = _split(start)[1]
            _set_thread_key(self._claim)
        self._keys = [start]
        self._current = start  # where a sampler asked in order has moved it

    @contextmanager
    def own(self) -> Iterator[None]:
        """Within the block the thread's key is this sequence's."""
        others = _thread_key()
        _set_thread_key(self._current)
        try:
            yield
        finally:
            self._current = _thread_key()
            _set_thread_key(others)

    def restore(self, step: int) -> None:
        """Set the thread's key to the one after ``step`` splits."""
        while len(self._keys) <= step:
            self._keys += _split_chain(self._keys[-1], _KEYS_PER_SPLIT_BATCH)
        _set_thread_key(self._keys[step])

    def finish(self, step: int | None) -> None:
        """Set the thread's key after ``step`` splits (None: where draws in order left it) if it was taken from it."""
        if self._claim is not None and _thread_key() == self._claim:
            if step is None:
                _set_thread_key(self._current)
            else:
                self.restore(step)
        self._claim = None


class _OnDemand(dict[int, int]):
    """The token after a node, drawn when it is first asked for."""

    def __init__(self, draw_at: Callable[[int], mx.array]) -> None:
        super().__init__()
        self._draw_at = draw_at

    def __missing__(self, node: int) -> int:
        token: int = self._draw_at(node).item()  # type: ignore[assignment]
        self[node] = token
        return token


def _is_pure(part: Sampler | LogitsProcessor) -> bool:
    """Whether mlx-lm made it; what it says then depends on its arguments and the random key alone."""
    return getattr(part, "__module__", None) == sample_utils.__name__


def _thread_key() -> Key:
    """The random key of this thread; MLX keeps one for each."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return high, low


def _set_thread_key(key: Key) -> None:
    """``mx.random.seed`` splits its 64-bit argument into the two words of the key."""
    mx.random.seed(key[0] << 32 | key[1])


def _words(data: bytes) -> Key:
    return int.from_bytes(data[:4], "big"), int.from_bytes(data[4:], "big")


@lru_cache(maxsize=1)
def _never_seeded() -> Key:
    """The key of a thread in which nothing has seeded MLX: the same one in all of them."""
    found: list[Key] = []
    thread = threading.Thread(target=lambda: found.append(_thread_key()))
    thread.start()
    thread.join()
    return found[0]


def _splits_per_draw(sampler: Sampler, vocab_size: int) -> int:
    """How many steps of the key chain one draw takes; 0 for a sampler that uses no noise."""
    known = _SPLITS.get(sampler)
    if known is None:
        before, start = _thread_key(), (7, 11)
        _set_thread_key(start)
        try:
            mx.eval(sampler(mx.full((1, vocab_size), -math.log(vocab_size))))
            end = _thread_key()
        finally:
            _set_thread_key(before)
        known = 0 if end == start else _split_chain(start, _MAX_SPLITS_PER_DRAW).index(end) + 1
        _SPLITS[sampler] = known
    return known


def _split(key: Key) -> tuple[Key, Key]:
    """Both halves of a key."""
    rows: list[list[int]] = mx.random.split(mx.array(key, dtype=mx.uint32), stream=mx.cpu).tolist()  # type: ignore
    return (rows[0][0], rows[0][1]), (rows[1][0], rows[1][1])


def _split_chain(key: Key, count: int) -> list[Key]:
    """The ``count`` keys that follow ``key`` when each draw splits the current one."""
    current, keys = mx.array(key, dtype=mx.uint32), []
    for _ in range(count):
        current = mx.random.split(current, stream=mx.cpu)[0]
        keys.append(current)
    rows: list[list[int]] = mx.stack(keys, stream=mx.cpu).tolist()  # type: ignore[assignment]
    return [(high, low) for high, low in rows]
