"""uvicorn, run as a command of ours: it says when it listens, and a SIGTERM that was obeyed is no failure."""

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, grace: float, ready: Callable[[], None], abandon: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._grace, self._ready, self._abandon = grace, ready, abandon

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, telling when it is done."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; answers that take longer are ended, so that their clients are told."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._abandon)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(
    app: Any,
    listener: socket.socket,
    *,
    grace: int,
    log_level: str,
    ready: Callable[[], None],
    abandon: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        grace: seconds that running answers then have.
        ready: called when requests are taken.
        abandon: called when the time is over; all answers are to end at once.

    Raises:
        KeyboardInterrupt: it was SIGINT.
    """
    config = uvicorn.Config(
        app,
        log_level=log_level.lower(),
        access_log=log_level.lower() in ("debug", "info"),
        timeout_graceful_shutdown=grace + 5,
        timeout_keep_alive=65,
        server_header=False,
        lifespan="off",
        limit_concurrency=None,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config, grace, ready, abandon)
    # uvicorn raises the signal once more when it has ended; SIGTERM then finds nothing left to do.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        signal.signal(signal.SIGTERM, before)
