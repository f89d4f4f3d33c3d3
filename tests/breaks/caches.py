"""Breaks of quantised, full and kept caches."""

from tests.breaks import Break

BREAKS = (
    Break(
        "a tree reaches across the point where the cache is quantised",
        "target.caches.CacheGrowth.max_depth",
        "return None if change is None else max(change - num_rows - 1, 0)",
        "return None",
        "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "the cache is quantised with the prompt's last chunk only",
        "engine.session.prefill",
        "growth.advance(caches)",
        "pass",
        "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "only the keys of a quantised cache are committed",
        "target.caches.arrays_of",
        "for half in (cache.keys, cache.values))",
        "for half in (cache.keys, cache.keys))",
        "test_the_cache_contract",
    ),
    Break(
        "a full cache is drafted into",
        "target.caches.is_full",
        "isinstance(caches[0], RotatingKVCache)",
        "False",
        "test_a_size_limited_cache",
    ),
    Break(
        "a full cache forgets its first tokens",
        "target.caches._size_limited",
        "limited.state = keys, values, max_size, KEPT_FIRST, max_size, max_size",
        "limited.state = keys, values, max_size, 0, max_size, max_size",
        "test_a_size_limited_cache",
    ),
    Break(
        "rows that only some layers have are believed",
        "target.caches.PrefixCache.reuse",
        ", *(cache.offset for cache in self.caches))",
        ")",
        "test_a_kept_prefix",
    ),
    Break(
        "a kept prefix is not compared with the prompt",
        "target.caches.PrefixCache.reuse",
        "and self.tokens[shared] == ids[shared]:",
        ":",
        "test_a_kept_prefix",
    ),
    Break(
        "a prompt cache of other weights is believed",
        "target.prompt_cache",
        "if tokens and not _computes(model, tokens, caches):",
        "if False:",
        "test_prompt_caches_that_do_not_fit",
    ),
)
