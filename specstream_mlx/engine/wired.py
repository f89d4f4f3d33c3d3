"""The wired memory limit of Metal: raised while anything generates, whoever began first and ends last."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

_lock = threading.Lock()
_users = 0
_limit = ExitStack()


@contextmanager
def wired(model: nn.Module) -> Iterator[None]:
    """Within the block the limit is raised, as mlx-lm does for one generation; blocks may overlap."""
    global _users
    with _lock:
        if _users == 0:
            _limit.enter_context(wired_limit(model, [generation_stream]))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limit.close()
