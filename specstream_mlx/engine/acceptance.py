"""The target's draws and the draft tree -> the accepted path (method section 5).

Acceptance needs no rule of its own: the target draws its token at every node exactly as plain decoding would, and
the walk from the root goes on while the drawn token is a child. What is emitted are the target's own draws, so the
text is plain decoding's whatever the tree holds.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from specstream_mlx.target.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """The outcome of one pass.

    Attributes:
        nodes: accepted nodes, the root first; their rows are what the cache keeps.
        tokens: the new tokens, one drawn at each accepted node; the last one is the next root.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def num_drafts(self) -> int:
        """How many drafted tokens were accepted."""
        return len(self.nodes) - 1


def accept(
    tree: DraftTree,
    node_tokens: Sequence[int],
    drawn: Sequence[int] | Mapping[int, int],
    *,
    max_tokens: int | None = None,
    stop_tokens: Container[int] = (),
) -> Accepted:
    """Walk from the root while the token drawn at a node is the token of one of its children.

    Row ``i`` of a pass predicts the token *after* node ``i``: ``drawn[i]`` is compared with the children of ``i``,
    never with ``node_tokens[i]``.

    Args:
        tree: the tree that was verified, T nodes.
        node_tokens: token of every node, (T,); the root's is the newest token.
        drawn: the target's draw at every node, (T,); only those on the path are read, from the root on.
        max_tokens: most tokens to emit; the walk ends there.
        stop_tokens: end-of-text ids; the walk ends with the first one drawn.
    """
    children: dict[tuple[int, int], int] = {}
    for node, parent in enumerate(tree.parents[1:], start=1):
        children.setdefault((parent, node_tokens[node]), node)
    nodes, tokens = [0], [drawn[0]]
    while tokens[-1] not in stop_tokens and len(tokens) != max_tokens:
        child = children.get((nodes[-1], tokens[-1]))
        if child is None:
            break
        nodes.append(child)
        tokens.append(drawn[child])
    return Accepted(tuple(nodes), tuple(tokens))
