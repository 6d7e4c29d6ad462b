"""`bitmill serve` on one machine: API, broker and worker in one process, one process for each data folder."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from sqlalchemy import make_url

import migrations
from api.data_dir import secure_and_log
from api.jobs.queue import expiry
from api.listening import listen
from api.main import create_app, settle
from api.observability import configure_logging
from api.private import FILE_MODE
from api.server import OnListening, Server
from api.settings import Settings
from worker.celery_app import CeleryThread, make_app
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.housekeeping import housekeeping

_LIVENESS_SECONDS = 0.5

log = structlog.get_logger(__name__)


class ServeRefused(Exception):
    """Why there can be no embedded server. Codes: `already_served`, `broker_needed`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def run_embedded(settings: Settings, on_listening: OnListening) -> None:
    """Serve until SIGTERM or SIGINT. A running job is given back, and goes on at the next start.

    Takes the port first, then brings the database's schema up to date. on_listening: called with the
    server's URL once it answers.

    Raises:
        ServeRefused: the data folder is being served, or the database may have other servers.
        CannotListen: `port_taken`, `cannot_listen`.
        RuntimeError: API or worker ended by itself; the log says why.
    """
    configure_logging(settings)
    if make_url(settings.database_url).get_backend_name() != "sqlite":
        raise ServeRefused(
            "broker_needed",
            "An embedded server gives back every job that runs, so its database has to be its own. "
            "Set BITMILL_BROKER_URL to a redis:// URL and run `bitmill worker` beside it, or use SQLite.",
        )
    secure_and_log(settings)
    with _only_server(settings.data_dir), listen(settings.host, settings.port) as listener:
        migrations.upgrade(settings.database_url)
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        app = create_app(settings)
        settle(app)
        server = Server(app, listener, settings.data_dir, on_listening)
        api = threading.Thread(target=server.serve_until_stopped, name="api", daemon=True)
        with _worker(settings) as celery, _until_signalled() as stopping:
            api.start()
            while not stopping.wait(_LIVENESS_SECONDS) and api.is_alive() and celery.is_alive():
                pass
            died = not stopping.is_set()
            server.should_exit = True
        api.join()
    if died:
        raise RuntimeError("The API or the worker ended by itself.")


@contextmanager
def _worker(settings: Settings) -> Iterator[CeleryThread]:
    """A worker beside the API. No other worker can be alive, so every lease is released first."""
    worker = WorkerContext.open(settings)
    with worker.database.write() as session:
        released = expiry.release_all(session)
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
def _only_server(data_dir: Path) -> Iterator[None]:
    """Hold the data folder's lock. The kernel drops it with the process.

    Raises:
        ServeRefused: `already_served`.
    """
    lock = os.open(data_dir / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
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
    stopping = threading.Event()

    def stop(_number: int, _frame: object) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
