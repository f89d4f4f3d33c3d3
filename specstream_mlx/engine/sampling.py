"""The target's draw at every node of a tree, exactly as plain decoding would make it (method section 5).

mlx-lm's samplers take their noise from the global random key, which every draw moves one or more steps along a chain
of splits. The noise of the i-th generated token is therefore a function of (seed, i) alone, and a node of depth ``g``
draws with the key of token ``i + g``. All nodes of a depth share it: at most one of them is on the accepted path.
The same seed thus gives the same text with speculation on or off, whatever the tree, and the text of mlx-lm itself.

mlx-lm's own samplers and logits processors depend on their arguments alone, so they may be asked at every node of the
tree at once. Any other may remember what it was asked (a grammar, a generator of its own), and nobody could take that
back: it is asked along the accepted path only, once per generated token and in order, as plain decoding asks.
"""

import math
from collections.abc import Callable, Container, Sequence

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
        """Prepare the key chain; ``seed`` None goes on from the global random state, as mlx-lm does.

        Args:
            sampler: (1, V) log-probabilities -> (1,) ids; None: greedy.
            logits_processors: (S,) ids along the path and (1, V) logits -> (1, V) logits.
            vocab_size: V.
            max_tokens, stop_tokens: where the text ends, after which samplers that remember are not asked any more.
        """
        if seed is not None:
            mx.random.seed(seed)
        self.sampler = None if sampler is greedy_sampler else sampler
        self.processors = list(logits_processors or ())
        self.num_drawn = 0
        self._max_tokens = max_tokens
        self._stop_tokens = stop_tokens
        self.in_order = not all(map(_is_pure, (*self.processors, self.sampler or greedy_sampler)))
        self._keys = [_global_key()]
        self._splits = 0
        if self.sampler is not None and not self.in_order:  # in order, the global key moves as in plain decoding
            self._splits = self._count_splits(self.sampler, vocab_size)

    def draw(self, logits: mx.array, tree: DraftTree, node_tokens: mx.array, history: mx.array | None) -> mx.array:
        """The target's token after every node.

        Args:
            logits: (T, V), row i predicts the token after node i.
            tree: the verified tree, T nodes.
            node_tokens: (T,) ids.
            history: (S,) ids before the root, given to the logits processors; None when there are none.

        Returns:
            (T,) ids; -1 at nodes off the accepted path where draws are made in order.
        """
        if self.sampler is None and not self.processors:
            return greedy_sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

        def draw_at(node: int) -> mx.array:
            row = logits[node : node + 1]
            if self.processors:
                tokens = node_tokens[mx.array(tree.ancestors(node))]
                if history is not None:
                    tokens = mx.concatenate([history, tokens])
                for processor in self.processors:
                    row = processor(tokens, row)
            logprobs = row - mx.logsumexp(row, keepdims=True)
            if self._splits:
                self._restore(self.num_drawn + tree.depths[node])
            return (self.sampler or greedy_sampler)(logprobs)

        if not self.in_order or tree.size == 1:
            return mx.concatenate([draw_at(node) for node in range(tree.size)])
        drawn = _OnDemand(draw_at)
        remaining = None if self._max_tokens == -1 else self._max_tokens - self.num_drawn
        ids: list[int] = node_tokens.tolist()  # type: ignore[assignment]
        accept(tree, ids, drawn, max_tokens=remaining, stop_tokens=self._stop_tokens)
        return mx.array([drawn.get(node, -1) for node in range(tree.size)])

    def advance(self, num_tokens: int) -> None:
        """Record that ``num_tokens`` draws were kept; the next root draws with the key after them."""
        self.num_drawn += num_tokens
        if self._splits:
            self._restore(self.num_drawn)

    def _restore(self, index: int) -> None:
        """Set the global key to the one that plain decoding has before it draws token ``index``."""
        step = index * self._splits
        while len(self._keys) <= step:
            self._keys += _split_chain(self._keys[-1], _KEYS_PER_SPLIT_BATCH)
        _set_global_key(self._keys[step])

    def _count_splits(self, sampler: Sampler, vocab_size: int) -> int:
        """How many steps of the key chain one draw takes; 0 for a sampler that uses no noise."""
        start = self._keys[0]
        mx.eval(sampler(mx.full((1, vocab_size), -math.log(vocab_size))))
        end = _global_key()
        _set_global_key(start)
        if end == start:
            return 0
        return _split_chain(start, _MAX_SPLITS_PER_DRAW).index(end) + 1


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


def _global_key() -> Key:
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    return high, low


def _set_global_key(key: Key) -> None:
    """``mx.random.seed`` splits its 64-bit argument into the two words of the key."""
    mx.random.seed(key[0] << 32 | key[1])


def _split_chain(key: Key, count: int) -> list[Key]:
    """The ``count`` keys that follow ``key`` when each draw splits the current one."""
    current, keys = mx.array(key, dtype=mx.uint32), []
    for _ in range(count):
        current = mx.random.split(current, stream=mx.cpu)[0]
        keys.append(current)
    rows: list[list[int]] = mx.stack(keys, stream=mx.cpu).tolist()  # type: ignore[assignment]
    return [(high, low) for high, low in rows]
