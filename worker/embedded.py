"""`bitmill serve` on one machine: API, broker and worker in one process, one process for each data folder."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import uvicorn
from sqlalchemy import make_url

import migrations
from api.jobs.queue import leases
from api.main import GRACE_SECONDS, create_app, settle
from api.observability import configure_logging
from api.settings import Settings
from worker.celery_app import CeleryThread, make_app
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.reaper import housekeeping

_LIVENESS_SECONDS = 0.5

log = structlog.get_logger(__name__)


class ServeRefused(Exception):
    """Why there can be no embedded server. Codes: `already_served`, `broker_needed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def run_embedded(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a running job is given back, and goes on at the next start.

    Brings the database's schema up to date first.

    Raises:
        ServeRefused: the data folder is being served, or the database may have other servers.
        RuntimeError: API or worker ended by itself; the log says why.
    """
    configure_logging(settings)
    if make_url(settings.database_url).get_backend_name() != "sqlite":
        raise ServeRefused(
            "broker_needed",
            "An embedded server gives back every job that runs, so its database has to be its own. "
            "Set BITMILL_BROKER_URL to a redis:// URL and run `bitmill worker` beside it, or use SQLite.",
        )
    with _only_one(settings.data_dir):
        migrations.upgrade(settings.database_url)
        app = create_app(settings)
        settle(app)
        api = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = uvicorn.Server(api)
        listening = threading.Thread(target=server.run, args=([bound(api)],), name="api", daemon=True)
        with _worker(settings) as celery, _until_signalled() as ending:
            listening.start()
            while not ending.wait(_LIVENESS_SECONDS) and listening.is_alive() and celery.is_alive():
                pass
            died = not ending.is_set()
            server.should_exit = True
        listening.join()
    if died:
        raise RuntimeError("The API or the worker ended by itself.")


def bound(api: uvicorn.Config) -> socket.socket:
    """The server's socket. Its connections send at once: asyncio sees to that only for sockets that were made
    with a protocol, and uvicorn makes this one without, so that every answer would take 40 ms longer."""
    made = api.bind_socket()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


@contextmanager
def _worker(settings: Settings) -> Iterator[CeleryThread]:
    """A worker beside the API. No other can be alive, so every lease that is held is given back first."""
    worker = WorkerContext.open(settings)
    with worker.database.write() as session:
        released = leases.release_all(session)
    if released:
        log.info("leases_released", count=released)
    presence = Presence(worker)
    celery = CeleryThread(make_app(worker, presence), worker)
    try:
        with housekeeping(worker, presence):
            celery.start()
            try:
                yield celery
            finally:
                worker.stopping.set()
                celery.stop()
    finally:
        worker.close()


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data folder's lock; the kernel drops it with the process."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(data_dir / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ServeRefused(
            "already_served",
            f"Another `bitmill serve` uses {data_dir}. Stop it, or set BITMILL_DATA_DIR to another folder.",
        ) from None
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. For the main thread."""
    ending = threading.Event()

    def end(_number: int, _frame: object) -> None:
        ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
