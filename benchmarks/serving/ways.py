"""Three ways to run several sequences in one pass, timed beside each other.

    python -m benchmarks.serving.ways [--model DIR] [--sequences 8] [--context 256] [--rows 1]

1. packed: rows in one line, attention sequence by sequence on plain caches (what the engine does);
2. one slab: keys and values of all sequences joined for every pass, and a mask that keeps them apart;
3. batch axis: sequences padded to one length, keys and values stacked for every pass.

Each prints milliseconds per pass and its ratio to one sequence after another.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from specstream_mlx import load
from specstream_mlx.target.rows import Draft
from specstream_mlx.target.target import Target
from specstream_mlx.target.together import Part
from specstream_mlx.target.tree import DraftTree


class Joined:
    """Way 2: all keys and values in one line."""

    offset = 0

    def __init__(self, caches: Sequence[Any], rows: int) -> None:
        self._caches, self._rows = caches, rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found = [
            cache.update_and_fetch(
                keys[:, :, i * self._rows : (i + 1) * self._rows], values[:, :, i * self._rows : (i + 1) * self._rows]
            )
            for i, cache in enumerate(self._caches)
        ]
        return mx.concatenate([k for k, _ in found], axis=2), mx.concatenate([v for _, v in found], axis=2)


class Stacked:
    """Way 3: all keys and values along a batch axis, padded at the end."""

    offset = 0

    def __init__(self, caches: Sequence[Any]) -> None:
        self._caches = caches

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found = [cache.update_and_fetch(keys[i : i + 1], values[i : i + 1]) for i, cache in enumerate(self._caches)]
        longest = max(k.shape[2] for k, _ in found)

        def padded(rows: mx.array) -> mx.array:
            return mx.pad(rows, [(0, 0), (0, 0), (0, longest - rows.shape[2]), (0, 0)])

        return mx.concatenate([padded(k) for k, _ in found]), mx.concatenate([padded(v) for _, v in found])


def main() -> None:
    """Time the three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens of the longest; others are shorter")
    parser.add_argument("--rows", type=int, default=1, help="rows of a sequence in a pass: a chain")
    parser.add_argument("--repeat", type=int, default=15)
    flags = parser.parse_args()
    target, _ = load(flags.model)
    count, rows = flags.sequences, flags.rows
    lengths = [flags.context - i * flags.context // (2 * count) for i in range(count)]
    every = []
    for length in lengths:
        caches = target.make_cache()
        target(mx.array([[7] * length]), cache=caches)
        mx.eval([cache.state for cache in caches])
        every.append(caches)
    drafts = [Draft(DraftTree.chain(rows - 1), mx.array([7 + i] * rows)) for i in range(count)]
    parts = [Part(draft, caches) for draft, caches in zip(drafts, every, strict=True)]
    places = [length + np.arange(rows) for length in lengths]

    def run(hidden: mx.array, mask: mx.array, views: Sequence[Any]) -> mx.array:
        with target.context.rows_at(mx.array(np.concatenate(places))):
            for index, layer in enumerate(target.layers):
                hidden = layer(hidden, mask, views[index])
        return target.family.head(target.family.norm(hidden))

    tokens = mx.concatenate([draft.tokens for draft in drafts])
    block = np.concatenate([_block(i, lengths, rows) for i in range(count)])
    padded = np.stack([_padded(length, max(lengths) + rows, rows) for length in lengths])[:, None]

    def one_slab() -> mx.array:
        views = [Joined([caches[index] for caches in every], rows) for index in range(len(target.layers))]
        return run(target.family.embed(tokens[None], np.concatenate(places)), mx.array(block), views)

    def batch_axis() -> mx.array:
        views = [Stacked([caches[index] for caches in every]) for index in range(len(target.layers))]
        hidden = target.family.embed(tokens[None], np.concatenate(places)).reshape(count, rows, -1)
        return run(hidden, mx.array(padded), views)

    ways: dict[str, Callable[[], Any]] = {
        "one after another": lambda: [target.verify(part.draft, part.caches).logits for part in parts],
        "1 packed": lambda: [passed.logits for passed in target.verify_together(parts)],
        "2 one slab": one_slab,
        "3 batch axis": batch_axis,
    }
    _time(ways, every, lengths, target, flags.repeat)


def _time(
    ways: dict[str, Callable[[], Any]], every: list[Any], lengths: list[int], target: Target, repeat: int
) -> None:
    times: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, Any] = {}
    for _ in range(repeat):
        for name, way in ways.items():
            begin = time.perf_counter()
            found = way()
            mx.eval(found)
            times[name].append(time.perf_counter() - begin)
            flat = mx.concatenate(found) if isinstance(found, list) else found.reshape(-1, found.shape[-1])
            first.setdefault(name, flat)
            for caches, length in zip(every, lengths, strict=True):
                for cache in caches:
                    cache.offset = length
    alone = median(times["one after another"])
    for name, found in times.items():
        off = float(mx.abs(first[name] - first["one after another"]).max())
        print(f"{name:18} {1000 * median(found):8.2f} ms  {alone / median(found):5.2f}x  largest difference {off:.1e}")


def _block(i: int, lengths: Sequence[int], rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(rows, sum of S) what the rows of sequence ``i`` see in the slab."""
    parts = []
    for j, length in enumerate(lengths):
        own = np.concatenate([np.ones((rows, length), bool), np.tri(rows, dtype=bool)], axis=1)
        parts.append(own if i == j else np.zeros_like(own))
    return np.concatenate(parts, axis=1)


def _padded(length: int, longest: int, rows: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    own = np.concatenate([np.ones((rows, length), bool), np.tri(rows, dtype=bool)], axis=1)
    return np.pad(own, [(0, 0), (0, longest - own.shape[1])])


if __name__ == "__main__":
    main()
