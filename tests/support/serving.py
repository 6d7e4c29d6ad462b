"""An app behind a real socket, in a thread of this process or in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from api.settings import Settings

START_SECONDS = 60
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


@contextmanager
def server_process(settings: Settings) -> Iterator[str]:
    """The URL of the API in a process of its own, which is killed when the block ends, whatever it does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    environment = {
        "BITMILL_DATA_DIR": str(settings.data_dir),
        "BITMILL_DATABASE_URL": settings.database_url,
        "BITMILL_LOCAL_ROOTS": os.pathsep.join(map(str, settings.local_roots)),
        "BITMILL_BROKER_URL": settings.broker_url,
        "BITMILL_LOG_LEVEL": "warning",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.serving", str(port)], env=os.environ | environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + START_SECONDS
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError("the server does not start; what it printed says why")
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    from api.main import create_app, settle
    from api.observability import configure_logging
    from api.settings import get_settings

    configure_logging(get_settings())
    made = create_app(get_settings())
    settle(made)
    uvicorn.run(made, port=int(sys.argv[1]), log_config=None, access_log=False)
