"""An app behind a real socket, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

STOP_SECONDS = 30


@contextmanager
def serving(app: FastAPI, *, port: int = 0, lifespan: str = "on") -> Iterator[str]:
    """The URL of an app that is served while the block runs."""
    config = uvicorn.Config(app, port=port, log_config=None, ws="none", lifespan=lifespan)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(STOP_SECONDS)
    assert not thread.is_alive()
