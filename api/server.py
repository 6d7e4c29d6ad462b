"""The HTTP server: uvicorn, on a socket that listens already."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

from api.listening import announced, url_of
from api.main import GRACE_SECONDS

OnListening = Callable[[str], None]
"""Called with the server's URL, once it answers there."""

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """Serves an application, and holds the lock by which commands on this machine know it (api/listening.py)
    for as long as it answers.

    listener: of `api.listening.listen`. data_dir: where the lock is.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, data_dir: Path, on_listening: OnListening
    ) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_SECONDS)
        )
        self._listener = listener
        self._data_dir = data_dir
        self._on_listening = on_listening
        self._announcement = ExitStack()

    def serve_until_stopped(self) -> None:
        """Serve until SIGTERM or SIGINT, or until `should_exit` is set."""
        self.run([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        url = url_of(*self._listener.getsockname()[:2])
        await asyncio.to_thread(self._announce, url)
        self._on_listening(url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            self._announcement.close()  # before the port is free for others
        finally:
            await super().shutdown(sockets)

    def _announce(self, url: str) -> None:
        """Take the lock. Without it the server serves all the same: over HTTP nobody needs it."""
        try:
            self._announcement.enter_context(announced(self._data_dir, url))
        except OSError as error:
            hint = "Commands on this machine need BITMILL_URL and BITMILL_API_KEY, both."
            log.warning("not_announced", url=url, reason=str(error), hint=hint)
