"""Key-value caches: which kinds can be used, their rows, how they change kind as mlx-lm's do, and a kept prefix.

Caches are mlx-lm's own objects, one per layer, so prompt caches stay interchangeable with mlx-lm. A pass appends all
its rows; ``commit_rows`` keeps the accepted ones and ``drop_rows`` none. That needs rows which can be taken back one by
one, in layers that all hold the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START, maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from specstream_mlx.errors import UnsupportedError, UsageError

SUPPORTED = (KVCache, QuantizedKVCache)
REFUSED = {  # every other class of mlx_lm.models.cache, and why
    "RotatingKVCache": "overwrites its oldest rows once it is full; make it without a size limit or window",
    "BatchRotatingKVCache": "holds a batch, and overwrites its oldest rows once it is full",
    "ArraysCache": "holds a recurrent state, which keeps no rows",
    "ChunkedKVCache": "drops its oldest chunks",
    "CacheList": "holds several caches per layer, of kinds that differ by model",
    "BatchKVCache": "holds a batch, and one sequence is decoded at a time",
    "ConcatenateKVCache": "brings trimmed rows back with the next append",
}
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)
KEPT_FIRST = 4  # tokens at the beginning that mlx-lm never overwrites in a size-limited cache


def check_caches(caches: Sequence[Any]) -> None:
    """Refuse caches whose rows cannot be taken back one by one.

    Raises:
        UnsupportedError: a cache is of another kind, or layers disagree about their length.
    """
    for index, cache in enumerate(caches):
        if type(cache) not in SUPPORTED:
            raise UnsupportedError(f"cache of layer {index}: {refusal(type(cache).__name__)}")
    if len({cache.offset for cache in caches}) > 1:
        raise UnsupportedError("prompt cache: layers hold different numbers of tokens; make a fresh cache")


def refusal(kind: str) -> str:
    """Why a kind of cache cannot be used."""
    return f"{kind} cannot take back rejected rows: it {REFUSED.get(kind, 'is unknown to this version')}"


def arrays_of(cache: Any) -> list[mx.array]:
    """The arrays that hold a cache's rows along their last axis but one: two, or six of a quantised cache."""
    halves = (half if isinstance(half, tuple | list) else (half,) for half in (cache.keys, cache.values))
    return [array for half in halves for array in half if array is not None]


def commit_rows(cache: Any, start: int, rows: Sequence[int]) -> None:
    """Keep, of the rows appended after ``start``, just ``rows`` (rising), moved together; drop the others.

    Rows that already lie in place are not touched, so committing a chain moves nothing.
    """
    in_place = 0
    while in_place < len(rows) and rows[in_place] == in_place:
        in_place += 1
    end = start + len(rows)
    if in_place < len(rows):
        source = mx.array([start + row for row in rows[in_place:]])
        for array in arrays_of(cache):
            array[..., start + in_place : end, :] = mx.take(array, source, axis=-2)
    cache.offset = end


def drop_rows(cache: Any, start: int) -> None:
    """Forget every row appended after ``start``."""
    commit_rows(cache, start, ())


@dataclass(frozen=True)
class CacheGrowth:
    """When caches change their kind while the text grows; names, defaults and moments are mlx-lm's.

    With ``kv_bits`` a cache is quantised after the pass that brings it to ``quantized_kv_start`` rows. With
    ``max_kv_size`` a full cache overwrites its oldest rows but the first four from then on; rejected rows would have
    overwritten some that are still needed, so decoding is plain from there.

    No pass may reach across such a change: rows beyond it would be computed over other keys than plain decoding has.
    """

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START
    max_kv_size: int | None = None

    def check(self, model: Any, caches: Sequence[Any] | None, num_tokens: int | None) -> None:
        """Make sure that ``model`` can be run this way.

        Args:
            caches: those of an earlier call, if any.
            num_tokens: how long the text can become; None: any length.

        Raises:
            UsageError: values out of range, or contradicting each other.
            UnsupportedError: no result is defined for this model or these caches.
        """
        if self.quantized_kv_start < 0:
            raise UsageError(f"quantized_kv_start is {self.quantized_kv_start}, expected at least 0")
        if self.max_kv_size is not None:
            self._check_size(model, caches, num_tokens)
        if self.kv_bits is not None:
            self._check_bits(model, caches)

    def _check_size(self, model: Any, caches: Sequence[Any] | None, num_tokens: int | None) -> None:
        assert self.max_kv_size is not None
        if self.max_kv_size <= KEPT_FIRST:
            raise UsageError(
                f"max_kv_size is {self.max_kv_size}, expected more than {KEPT_FIRST}: the first {KEPT_FIRST} tokens "
                "are always kept"
            )
        if self.kv_bits is not None:
            raise UnsupportedError("kv_bits and max_kv_size: mlx-lm has no quantised cache of limited size; drop one")
        if caches is not None:
            raise UsageError("max_kv_size goes with a fresh cache, a prompt cache keeps its own size; drop one")
        outgrown = num_tokens is None or num_tokens > self.max_kv_size
        if outgrown and hasattr(model.base, "make_cache"):
            longest = "without a limit" if num_tokens is None else f"of up to {num_tokens} tokens"
            raise UnsupportedError(
                f"max_kv_size is {self.max_kv_size}, for a text {longest}: mlx-lm makes this family's caches without a "
                "size limit, so that nothing would be forgotten; ask for fewer tokens, or drop max_kv_size"
            )

    def _check_bits(self, model: Any, caches: Sequence[Any] | None) -> None:
        if self.kv_bits not in KV_BITS:
            raise UsageError(f"kv_bits is {self.kv_bits}, expected one of {', '.join(map(str, KV_BITS))}")
        if self.kv_group_size not in KV_GROUP_SIZES:
            expected = ", ".join(map(str, KV_GROUP_SIZES))
            raise UsageError(f"kv_group_size is {self.kv_group_size}, expected one of {expected}")
        for cache in caches or ():
            if isinstance(cache, QuantizedKVCache) and (cache.bits, cache.group_size) != (
                self.kv_bits,
                self.kv_group_size,
            ):
                raise UsageError(
                    f"kv_bits {self.kv_bits} and kv_group_size {self.kv_group_size}: the prompt cache has "
                    f"{cache.bits} bits in groups of {cache.group_size}; give its values, or none"
                )
        if any(type(cache) is RotatingKVCache for cache in make_prompt_cache(model.base)):
            raise UnsupportedError(
                "kv_bits: mlx-lm cannot quantise the cache of a layer with a sliding window; drop it"
            )
        if not model.family.SHARED_ATTENTION:
            raise UnsupportedError(
                f"kv_bits: mlx-lm's attention of {model.model_type} cannot read a quantised cache; drop it"
            )
        sizes = {size for layer in layout(model) for size in layer.sizes}
        odd = [size for size in sorted(sizes) if size % self.kv_group_size]
        if odd:
            raise UnsupportedError(
                f"kv_group_size is {self.kv_group_size}: heads of {odd[0]} numbers cannot be quantised in such "
                "groups; take a smaller one that divides them, or drop kv_bits"
            )

    def make_caches(self, model: Any, num_prefilled: int) -> list[Any]:
        """Fresh caches for a prompt of which ``num_prefilled`` tokens, all but the last, are run at first."""
        outgrown = self.max_kv_size is not None and num_prefilled > self.max_kv_size
        caches: list[Any] = make_prompt_cache(model.base, self.max_kv_size) if outgrown else model.make_cache()
        return caches

    def advance(self, caches: list[Any]) -> None:
        """Change the caches' kind after a pass, in place, where they have come to that point."""
        maybe_quantize_kv_cache(caches, self.quantized_kv_start, self.kv_group_size, self.kv_bits)
        if self.max_kv_size is not None and self.changes(caches, caches[0].offset):
            caches[:] = [_size_limited(cache, self.max_kv_size) for cache in caches]

    def changes(self, caches: Sequence[Any], num_rows: int) -> bool:
        """Whether the caches change their kind when they come to ``num_rows`` rows."""
        change = self._next_change(caches)
        return change is not None and num_rows >= change

    def max_depth(self, caches: Sequence[Any], num_rows: int) -> int | None:
        """How far a tree may reach below its root, which follows ``num_rows`` rows; None: as far as it likes."""
        if is_full(caches):
            return 0
        change = self._next_change(caches)
        return None if change is None else max(change - num_rows - 1, 0)

    def _next_change(self, caches: Sequence[Any]) -> int | None:
        """The number of rows at which the caches change their kind; None when they never do any more."""
        if self.kv_bits is not None and not isinstance(caches[0], QuantizedKVCache):
            return self.quantized_kv_start
        return None if is_full(caches) else self.max_kv_size


def is_full(caches: Sequence[Any]) -> bool:
    """Whether the caches overwrite their oldest rows by now."""
    return isinstance(caches[0], RotatingKVCache)


def _size_limited(cache: KVCache, max_size: int) -> RotatingKVCache:
    """The cache that mlx-lm has after as many rows as it can hold."""
    limited = RotatingKVCache(max_size, keep=KEPT_FIRST)
    keys, values = cache.keys_and_values()
    limited.state = keys, values, max_size, KEPT_FIRST, max_size, max_size
    return limited


@dataclass(frozen=True)
class LayerLayout:
    """What the rows of one layer look like: key and value heads, their sizes, and what they are made of."""

    heads: tuple[int, int]
    sizes: tuple[int, int]
    dtype: mx.Dtype


def layout(model: Any) -> list[LayerLayout]:
    """The rows that a model's layers append, one entry per layer; nothing is computed."""
    caches = model.make_cache()
    model(mx.array([[0]]), cache=caches)  # lazy, and never evaluated
    return [
        LayerLayout(
            (cache.keys.shape[1], cache.values.shape[1]),
            (cache.keys.shape[-1], cache.values.shape[-1]),
            cache.keys.dtype,
        )
        for cache in caches
    ]


class PrefixCache:
    """Caches kept between calls with the tokens they hold, so that a prompt's known beginning is not run again::

        kept = PrefixCache(model)
        for response in stream_generate(model, tokenizer, kept.reuse(ids), prompt_cache=kept.caches):
            kept.tokens += response.tokens

    Whatever happened to the last call, the next one may follow: rows are only believed as far as they are known.
    """

    def __init__(self, model: Any, caches: list[Any] | None = None, tokens: Sequence[int] = ()) -> None:
        """Start with nothing, or with ``caches`` that hold ``tokens``.

        Raises:
            UnsupportedError: caches that cannot take back rows.
        """
        self.model = model
        self.caches: list[Any] = model.make_cache() if caches is None else caches
        self.tokens = list(tokens)
        check_caches(self.caches)

    def reuse(self, prompt: Sequence[int]) -> list[int]:
        """Trim the caches to what they share with ``prompt``; returns the rest of it, at least the last token.

        Where nothing is shared, ``caches`` are fresh ones. ``tokens`` become those of ``prompt``.
        """
        ids = list(prompt)
        # An interrupted pass may have left rows in some layers only.
        most = min(len(self.tokens), len(ids) - 1, *(cache.offset for cache in self.caches))
        shared = 0
        while shared < most and self.tokens[shared] == ids[shared]:
            shared += 1
        if shared:
            for cache in self.caches:
                cache.trim(cache.offset - shared)
        else:
            self.caches = self.model.make_cache()
        self.tokens = ids
        return ids[shared:]
