"""uvicorn, run as a command of ours: it says when it listens, and a SIGTERM that was obeyed is no failure."""

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, telling when it is done."""
        await super().startup(sockets)
        if self.started:
            self._ready()


def run(app: Any, listener: socket.socket, grace: int, log_level: str, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; running answers then have ``grace`` seconds.

    Raises:
        KeyboardInterrupt: it was SIGINT.
    """
    config = uvicorn.Config(
        app,
        log_level=log_level.lower(),
        access_log=log_level.lower() in ("debug", "info"),
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=65,
        server_header=False,
        lifespan="off",
        limit_concurrency=None,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config, ready)
    # uvicorn raises the signal once more when it has ended; SIGTERM then finds nothing left to do.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        signal.signal(signal.SIGTERM, before)
