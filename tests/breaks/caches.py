"""Breaks of quantised, full and kept caches."""

from tests.breaks import Break

CACHES = "tests/test_caches.py::"
BREAKS = (
    Break(
        "a tree reaches across the point where the cache is quantised",
        "specstream_mlx/target/caches.py",
        "return None if change is None else max(change - num_rows - 1, 0)",
        "return None",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "a foreseen pass reaches across it",
        "specstream_mlx/engine/single.py",
        "if tree.size > 1 and self.growth.changes(self.caches, cached):",
        "if False:",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "the cache is quantised with the prompt's last chunk only",
        "specstream_mlx/engine/single.py",
        "            if growth is not None:\n                growth.advance(caches)",
        "            pass",
        CACHES + "test_tokens_over_a_quantised_cache_are_mlx_lms",
    ),
    Break(
        "only the keys of a quantised cache are committed",
        "specstream_mlx/target/caches.py",
        "for half in (cache.keys, cache.values))\n",
        "for half in (cache.keys, cache.keys))\n",
        CACHES + "test_the_cache_contract",
    ),
    Break(
        "a full cache is drafted into",
        "specstream_mlx/target/caches.py",
        "        if is_full(caches):\n            return 0",
        "        pass",
        CACHES + "test_a_size_limited_cache",
    ),
    Break(
        "a full cache forgets its first tokens",
        "specstream_mlx/target/caches.py",
        "limited.state = keys, values, max_size, KEPT_FIRST, max_size, max_size",
        "limited.state = keys, values, max_size, 0, max_size, max_size",
        CACHES + "test_a_size_limited_cache",
    ),
    Break(
        "rows that only some layers have are believed",
        "specstream_mlx/target/caches.py",
        "most = min(len(self.tokens), len(ids) - 1, *(cache.offset for cache in self.caches))",
        "most = min(len(self.tokens), len(ids) - 1)",
        CACHES + "test_a_kept_prefix",
    ),
    Break(
        "a kept prefix is not compared with the prompt",
        "specstream_mlx/target/caches.py",
        "while shared < most and self.tokens[shared] == ids[shared]:",
        "while shared < most:",
        CACHES + "test_a_kept_prefix",
    ),
    Break(
        "a prompt cache of other weights is believed",
        "specstream_mlx/target/prompt_cache.py",
        "if tokens and not _computes(model, tokens, caches):",
        "if False:",
        CACHES + "test_prompt_caches_that_do_not_fit",
    ),
)
