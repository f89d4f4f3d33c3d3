"""Prompt lookup: what followed the last few tokens earlier in the text is drafted. It has no weights.

After text that repeats itself (code, summaries, answers that quote) this costs nothing but rows.
"""

from collections.abc import Sequence

import mlx.core as mx

from specstream_mlx.drafters.protocol import Anchor, DraftState, Wish
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Target
from specstream_mlx.target.tree import DraftTree, Path

NUM_DRAFT_TOKENS = 10
LONGEST = 3  # tokens that must match, tried first; then fewer


class PromptLookup:
    """As ``protocol.Drafter``."""

    name = "prompt-lookup"
    ways = ("deferred",)
    taps: tuple[int, ...] = ()

    def __init__(self, num_draft_tokens: int = NUM_DRAFT_TOKENS) -> None:
        """``num_draft_tokens``: how far ahead to guess."""
        self.max_depth = num_draft_tokens

    def begin(self, target: Target, prompt: Sequence[int]) -> "PromptLookupState":
        """As ``Drafter``."""
        return PromptLookupState(prompt)


class PromptLookupState(DraftState):
    """The text so far, and where each run of up to ``LONGEST`` tokens was seen in it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._pending: list[Sequence[int] | mx.array] = [prompt]
        self._seen: dict[tuple[int, ...], list[int]] = {}  # run of tokens -> where it ended, last one last

    def commit(self, tokens: Sequence[int] | mx.array) -> None:
        """As ``DraftState``."""
        self._pending.append(tokens)

    def propose(self, anchor: Anchor, wish: Wish) -> Draft:
        """As ``DraftState``."""
        return self.open(anchor.root, wish)

    def open(self, root: mx.array, wish: Wish) -> Draft:
        """As ``DraftState``: for a chain what followed last, for a tree also what followed before that."""
        self._read()
        chain = wish.tree is not None and wish.tree.is_chain
        budget = wish.budget if wish.tree is None else wish.tree.size - 1
        paths, tokens = self._continuations(wish.depth, budget, 1 if chain else budget)
        if not paths:
            return Draft(DraftTree.chain(0), root)
        tree = DraftTree.from_paths(paths)
        drafted = mx.array([tokens[path] for path in tree.paths[1:]], dtype=root.dtype)
        return Draft(tree, mx.concatenate([root, drafted]))

    def _read(self) -> None:
        """Take the tokens that came since into the text; they are known by now."""
        for tokens in self._pending:
            ids: list[int] = tokens.tolist() if isinstance(tokens, mx.array) else list(tokens)  # type: ignore
            for token in ids:
                end = len(self._text)
                # What ends with the newest token is looked for, so it is entered when the next one comes.
                for length in range(1, min(LONGEST, end) + 1):
                    self._seen.setdefault(tuple(self._text[end - length :]), []).append(end)
                self._text.append(token)
        self._pending = []

    def _continuations(self, depth: int, budget: int, most: int) -> tuple[list[Path], dict[Path, int]]:
        """Up to ``most`` continuations as paths of a tree of at most ``budget`` nodes, and their tokens."""
        paths: list[Path] = []
        tokens: dict[Path, int] = {}
        children: dict[Path, dict[int, Path]] = {(): {}}
        tried: set[int] = set()
        for length in range(min(LONGEST, len(self._text)), 0, -1):
            for begin in reversed(self._seen.get(tuple(self._text[-length:]), [])):
                if begin in tried:
                    continue
                if len(tried) == most or len(paths) >= budget:
                    return paths, tokens
                tried.add(begin)
                path: Path = ()
                for token in self._text[begin : begin + depth]:
                    siblings = children[path]
                    if token not in siblings:
                        if len(paths) >= budget:
                            break
                        siblings[token] = (*path, len(siblings))
                        children[siblings[token]] = {}
                        paths.append(siblings[token])
                        tokens[siblings[token]] = token
                    path = siblings[token]
        return paths, tokens
