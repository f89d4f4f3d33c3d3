"""The streams' variant without ``P_j``: a stream is told by a rotation of its values (method section 2)."""

from typing import Any

import mlx.core as mx


class ValueRotation:
    """A KV cache that turns the values of stream rows on their way in (method section 2, variant without ``P_j``).

    The value of stream ``j`` is ``V * exp(i * epsilon * j)``: the first half of the head dimension holds real parts,
    the second half imaginary parts. Everything else is the wrapped cache's.
    """

    def __init__(self, cache: Any, stream_index: mx.array, epsilon: float) -> None:
        """``stream_index``: (L,) the stream number of each row of the pass, 0 for main rows (left unturned)."""
        self._cache = cache
        angle = stream_index.astype(mx.float32) * epsilon
        self._cos, self._sin = mx.cos(angle)[:, None], mx.sin(angle)[:, None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append (1, H_kv, L, D_h) keys and turned values."""
        real, imaginary = mx.split(values, 2, axis=-1)
        cos, sin = self._cos.astype(values.dtype), self._sin.astype(values.dtype)
        turned = mx.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
        return self._cache.update_and_fetch(keys, turned)
