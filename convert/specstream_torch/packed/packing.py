"""Packs examples into rows: those with a common beginning share one copy of it, and rows hold several groups.

A group is a prefix and its branches; a branch sees the prefix and itself:

    row    p p p p a a a b b . q q q c c
    group  0 0 0 0 0 0 0 0 0 . 1 1 1 1 1      p prefix, a and b branches of it, q a prefix with one branch c
    branch - - - - 0 0 0 1 1 . - - - 2 2

Every branch holds at least the last prompt token of its example, so an answer's first token is predicted from a row
of its own. Everything is decided by the seed and the epoch, so an interrupted training goes on with the next step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..loss import Example

PREFIX = -1
PAD = -2


@dataclass(frozen=True)
class Group:
    """Examples that share their first `shared` tokens."""

    examples: tuple[Example, ...]
    shared: int

    def __len__(self) -> int:
        return self.shared + sum(len(example) - self.shared for example in self.examples)


@dataclass
class PackedBatch:
    """R rows of L tokens. ``main_rows`` and ``anchor_rows`` index the flattened (R * L) tokens."""

    tokens: torch.Tensor  # (R, L)
    positions: torch.Tensor  # (R, L)
    visible: torch.Tensor  # (R, L, L), True where row q sees key k
    main_rows: torch.Tensor  # (M,) rows that predict an answer token
    main_targets: torch.Tensor  # (M,)
    main_counts: torch.Tensor  # (M,) bool, False where main's loss is left out
    anchors: torch.Tensor  # (R, A) positions in the row; 0 where there is none
    anchored: torch.Tensor  # (R, A)
    stream_targets: torch.Tensor  # (R, A, gamma), -1 past the end
    stream_main: torch.Tensor  # (R, A, gamma), the entry of `main_rows` that predicts the same token, -1 past the end
    num_examples: int

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return PackedBatch(**moved, num_examples=self.num_examples)


def make_groups(examples: Sequence[Example], max_branches: int, shuffler: random.Random) -> list[Group]:
    """Put examples that follow one another in sorted order, and so share a beginning, into groups, shuffled.

    A group is closed where sharing with the next example would save less than half of its prompt.
    """
    order = sorted(range(len(examples)), key=lambda i: (examples[i].prompt, shuffler.random()))
    groups: list[list[Example]] = []
    for index in order:
        example = examples[index]
        if groups and len(groups[-1]) < max_branches:
            shared = shared_length([*groups[-1], example])
            if 2 * shared >= len(example.prompt):
                groups[-1].append(example)
                continue
        groups.append([example])
    shuffler.shuffle(groups)
    return [Group(tuple(group), shared_length(group)) for group in groups]


def shared_length(examples: Sequence[Example]) -> int:
    """How many first prompt tokens all examples have in common, the last prompt token never included."""
    limit = min(len(example.prompt) for example in examples) - 1
    first, last = (pick(example.prompt[:limit] for example in examples) for pick in (min, max))
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def iterate_steps(
    examples: Sequence[Example], *, seed: int, max_branches: int, row_tokens: int, step_tokens: int
) -> Iterator[list[list[Group]]]:
    """Yield, without end, the rows of each optimiser step: lists of groups of at most `row_tokens` together.

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError("no examples to train on")
    epoch = 0
    while True:
        shuffler = random.Random(f"{seed}/{epoch}")
        rows: list[list[Group]] = []
        used: list[int] = []
        for group in make_groups(examples, max_branches, shuffler):
            place = next((i for i, tokens in enumerate(used) if tokens + len(group) <= row_tokens), None)
            if place is None:
                if sum(used) + len(group) > step_tokens and rows:
                    yield rows
                    rows, used = [], []
                rows.append([])
                used.append(0)
                place = -1
            rows[place].append(group)
            used[place] += len(group)
        if rows:
            yield rows
        epoch += 1


def pack(
    rows: Sequence[Sequence[Group]], gamma: int, shuffler: random.Random, *, main_counts: bool = True
) -> PackedBatch:
    """Lay the groups of every row out.

    Rows have one number of anchors, the rounded mean; a row that has more keeps as many at random.
    """
    length = max(sum(len(group) for group in row) for row in rows)
    length += -length % 16
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    group_ids = torch.full((len(rows), length), PAD)
    branch_ids = torch.full((len(rows), length), PAD)
    main_rows: list[int] = []
    main_targets: list[int] = []
    anchors: list[list[tuple[int, list[int], list[int]]]] = []
    for r, row in enumerate(rows):
        at, branch = 0, 0
        anchors.append([])
        for g, group in enumerate(row):
            shared = group.shared
            parts = [(group.examples[0].prompt[:shared], 0, PREFIX)]
            for example in group.examples:
                parts.append(((*example.prompt, *example.answer)[shared:], shared, branch))
                branch += 1
            for number, (ids, start, branch_id) in enumerate(parts):
                if not ids:
                    continue
                span = slice(at, at + len(ids))
                tokens[r, span] = torch.tensor(ids)
                positions[r, span] = torch.arange(start, start + len(ids))
                group_ids[r, span] = g
                branch_ids[r, span] = branch_id
                if branch_id != PREFIX:
                    answer = group.examples[number - 1].answer
                    first = at + len(ids) - len(answer) - 1  # the row of the last prompt token
                    entry = len(main_rows)
                    main_rows += [r * length + first + i for i in range(len(answer))]
                    main_targets += answer
                    for i in range(len(answer) - 1):
                        ahead = range(i + 1, min(i + 1 + gamma, len(answer)))
                        fill = [-1] * (gamma - len(ahead))
                        anchors[-1].append(
                            (first + i, [*(answer[k] for k in ahead), *fill], [*(entry + k for k in ahead), *fill])
                        )
                at += len(ids)
    count = max(1, round(sum(map(len, anchors)) / len(rows)))
    table = torch.zeros(len(rows), count, dtype=torch.long)
    anchored = torch.zeros(len(rows), count, dtype=torch.bool)
    stream_targets = torch.full((len(rows), count, gamma), -1)
    stream_main = torch.full((len(rows), count, gamma), -1)
    for r, found in enumerate(anchors):
        kept = found if len(found) <= count else shuffler.sample(found, count)
        if kept:
            table[r, : len(kept)] = torch.tensor([anchor for anchor, _, _ in kept])
            anchored[r, : len(kept)] = True
            stream_targets[r, : len(kept)] = torch.tensor([targets for _, targets, _ in kept])
            stream_main[r, : len(kept)] = torch.tensor([entries for _, _, entries in kept])
    same_group = group_ids[:, :, None] == group_ids[:, None, :]
    same_branch = branch_ids[:, :, None] == branch_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = same_group & (same_branch | (branch_ids == PREFIX)[:, None, :]) & causal
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        visible=visible,
        main_rows=torch.tensor(main_rows),
        main_targets=torch.tensor(main_targets),
        main_counts=torch.full((len(main_targets),), main_counts),
        anchors=table,
        anchored=anchored,
        stream_targets=stream_targets,
        stream_main=stream_main,
        num_examples=sum(len(group.examples) for row in rows for group in row),
    )


def frequent_tokens(examples: Sequence[Example], limit: int) -> torch.Tensor:
    """The ids that occur most often in the answers, at most `limit` of them."""
    counts = Counter(token for example in examples for token in example.answer)
    return torch.tensor(sorted(token for token, _ in counts.most_common(limit)))
