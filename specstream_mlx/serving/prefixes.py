"""Prompts that were run before: their caches, by adapter and tokens, in memory and on disk.

The trie and its bounds are mlx-lm's ``LRUPromptCache``. Files are prompt caches as ``cache_prompt`` writes them, so a
damaged one, or one of other weights, is recognised when it is read, and left aside.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import KVCache, LRUPromptCache

from specstream_mlx.errors import SpecStreamError
from specstream_mlx.target.prompt_cache import load_prompt_cache, read_metadata, save_prompt_cache

_LOG = logging.getLogger(__name__)
_TOKENS, _ADAPTER, _MODEL = "specstream_tokens", "specstream_adapter", "model"
LEAST = 16  # tokens worth keeping


class Prefixes:
    """Kept caches; used by the thread that owns the model.

    Attributes:
        hit_tokens, asked_tokens: prompt tokens found here, and asked for.
    """

    def __init__(self, model_name: str, *, size: int, num_bytes: int, directory: Path | None = None) -> None:
        """``size``: most prompts; ``num_bytes``: most bytes, in memory and on disk each."""
        self._name, self._directory, self._num_bytes = model_name, directory, num_bytes
        self._kept = LRUPromptCache(max(size, 1), num_bytes) if size else None
        self._unsaved: deque[tuple[str, tuple[int, ...], list[Any]]] = deque(maxlen=max(size, 1))
        self.hit_tokens = self.asked_tokens = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return 0 if self._kept is None else int(self._kept.nbytes)

    def __len__(self) -> int:
        return 0 if self._kept is None else len(self._kept)

    def take(self, adapter: str, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Caches of one's own that hold the beginning of a prompt, and how much of it, never all; None: nothing."""
        self.asked_tokens += len(tokens)
        if self._kept is None:
            return None, 0
        caches, rest = self._kept.fetch_nearest_cache(adapter, tokens)
        if caches is None:
            return None, 0
        found = min(len(tokens) - len(rest), len(tokens) - 1, *(cache.offset for cache in caches))
        if found < 1:
            return None, 0
        for cache in caches:
            cache.trim(cache.offset - found)
        self.hit_tokens += found
        return caches, found

    def keep(self, adapter: str, tokens: Sequence[int], caches: list[Any]) -> None:
        """Keep caches, which are nobody else's from now on, with the tokens that they may hold."""
        rows = min(len(tokens), *(cache.offset for cache in caches))
        if self._kept is None or rows < LEAST or any(type(cache) is not KVCache for cache in caches):
            return
        for cache in caches:
            cache.trim(cache.offset - rows)
        held = list(tokens[:rows])
        self._kept.insert_cache(adapter, held, caches)
        if self._directory is not None:
            self._unsaved.append((adapter, tuple(held), caches))

    def save_one(self) -> bool:
        """Write the oldest caches that are not on disk yet; whether there were any."""
        if self._directory is None or not self._unsaved:
            return False
        adapter, tokens, caches = self._unsaved.popleft()
        digest = hashlib.sha256(json.dumps([self._name, adapter, tokens]).encode()).hexdigest()[:32]
        path = self._directory / f"{digest}.safetensors"
        metadata = {_MODEL: self._name, "tokenizer_config": "{}", _ADAPTER: adapter, _TOKENS: json.dumps(tokens)}
        try:
            if not path.exists():
                save_prompt_cache(path, caches, tokens, metadata)
            self._trim_directory()
        except (SpecStreamError, OSError) as error:
            _LOG.warning("prompt cache not kept on disk: %s", error)
        return True

    def load(self, model: Any, adapters: Sequence[str], use: Any) -> int:
        """Read what an earlier server left; ``use`` puts an adapter to use. Returns how many prompts."""
        if self._directory is None or self._kept is None:
            return 0
        count = 0
        for path in sorted(self._files(), key=lambda file: file.stat().st_mtime):
            try:
                metadata = read_metadata(path)
                adapter = metadata.get(_ADAPTER)
                tokens = json.loads(metadata.get(_TOKENS, "null"))
                if metadata.get(_MODEL) != self._name or adapter not in adapters or not isinstance(tokens, list):
                    continue
                use(adapter)
                caches = load_prompt_cache(path, model)
                if any(type(cache) is not KVCache or cache.offset != len(tokens) for cache in caches):
                    raise ValueError("its tokens are not those of its rows")
            except (SpecStreamError, OSError, ValueError, RecursionError) as error:
                _LOG.warning("prompt cache left aside: %s", error)
                continue
            self._kept.insert_cache(adapter, tokens, caches)
            count += 1
        return count

    def _files(self) -> list[Path]:
        assert self._directory is not None
        return [path for path in self._directory.glob("*.safetensors") if path.is_file()]

    def _trim_directory(self) -> None:
        """Delete the oldest files beyond the bound."""
        files = sorted(self._files(), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self._num_bytes:
                path.unlink(missing_ok=True)
