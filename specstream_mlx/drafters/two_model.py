"""Two models: a smaller one drafts, step by step, what the target verifies.

Every step of the draft model sees the guess before it, so a chain follows its own text; the runners-up of each step
make the tree's further nodes at no cost but rows.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from specstream_mlx.drafters.fill import fill_candidates, top_candidates
from specstream_mlx.drafters.protocol import Anchor, DraftState, Wish, root_alone
from specstream_mlx.errors import InvalidInputError
from specstream_mlx.target.caches import drop_rows
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Target
from specstream_mlx.target.tree import DraftTree

NUM_DRAFT_TOKENS = 4
_PREFILL_STEP = 512
_MOST_AT_ONCE = 8  # rows of a step


class TwoModel:
    """As ``protocol.Drafter``."""

    name = "two-model"
    ways = ("deferred",)
    taps: tuple[int, ...] = ()

    def __init__(self, draft: Target, num_draft_tokens: int = NUM_DRAFT_TOKENS) -> None:
        """``draft``: the second model, with the target's vocabulary; ``num_draft_tokens``: how far ahead to guess."""
        self.draft = draft
        self.max_depth = num_draft_tokens

    def begin(self, target: Target, prompt: Sequence[int]) -> "TwoModelState":
        """As ``Drafter``.

        Raises:
            InvalidInputError: the two models have different vocabularies.
        """
        sizes = target.args.vocab_size, self.draft.args.vocab_size
        if sizes[0] != sizes[1]:
            raise InvalidInputError(
                f"draft model: {sizes[1]} tokens in its vocabulary, {sizes[0]} in the model's; give a smaller model "
                "of the same family"
            )
        return TwoModelState(self.draft, prompt)


class TwoModelState(DraftState):
    """The draft model's caches, which hold the text up to some token, and after a proposal its own guesses."""

    def __init__(self, draft: Target, prompt: Sequence[int]) -> None:
        self._draft = draft
        self._caches = draft.make_cache()
        self._pending: list[Sequence[int] | mx.array] = [prompt]  # of the text, not in the caches yet
        self._rows = 0  # of the text, in the caches
        self._guesses: mx.array | None = None  # (depth,) the last proposal's chain; all but its last are in the caches

    def commit(self, tokens: Sequence[int] | mx.array) -> None:
        """As ``DraftState``: rows of guesses that were right stay in the caches."""
        right = 0
        if self._guesses is not None:
            ids: list[int] = tokens.tolist() if isinstance(tokens, mx.array) else list(tokens)  # type: ignore
            guessed: list[int] = self._guesses[:-1].tolist()  # type: ignore[assignment]
            while right < min(len(guessed), len(ids) - 1) and guessed[right] == ids[right]:
                right += 1
            self._rows += right
            self._keep(self._rows)
            self._guesses = None
            tokens = ids
        self._pending.append(tokens[right:])

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """As ``DraftState``; nothing is read back where the tree is given."""
        feed = mx.concatenate([_ids(tokens) for tokens in self._pending])
        depth = self._draft.tokens_within_context(wish.depth, self._rows + len(feed) - 1)
        if depth < 1:
            return root_alone(anchor)
        wish, self._pending = replace(wish, depth=depth), []
        while len(feed) > _MOST_AT_ONCE:  # without the LM head
            part = feed[: min(_PREFILL_STEP, len(feed) - 1)]
            self._draft(part[None], cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
            self._rows += len(part)
            feed = feed[len(part) :]
        tree = _along_the_chain(wish)
        width = max(tree.widths, default=1)
        self._rows += len(feed)
        steps: list[mx.array] = []
        for _ in range(tree.max_depth):
            logits = self._draft(feed[None], cache=self._caches)[0, -1:]
            self.own_passes += 1
            steps.append(top_candidates(logits, min(width, logits.shape[-1])))
            feed = steps[-1][0, :1]
        candidates = mx.concatenate(steps)
        self._guesses = candidates[:, 0]
        mx.async_eval(self._guesses)  # type: ignore[no-untyped-call]  # another thread may compare it with the text
        return fill_candidates(anchor.root, candidates, tree)

    def _keep(self, rows: int) -> None:
        for cache in self._caches:
            drop_rows(cache, rows)


def _along_the_chain(wish: Wish) -> DraftTree:
    """The nodes whose parent is the best guess of its step: others' children are not known."""
    if wish.tree is None:
        width = max(wish.budget // wish.depth, 1)
        paths = [(0,) * depth + (rank,) for depth in range(wish.depth) for rank in range(width)]
        return DraftTree.from_paths(paths)
    tree = wish.tree.truncate(wish.depth)
    return DraftTree.from_paths([path for path in tree.paths if not any(path[:-1])])


def _ids(tokens: Sequence[int] | mx.array) -> mx.array:
    return tokens.astype(mx.int32) if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
