"""Celery, which wakes workers when there are jobs. A message may be lost: workers also look regularly."""

from __future__ import annotations

import threading

from celery import Celery, signals
from celery.worker import state

from api.data_dir import secure_and_log
from api.observability import configure_logging
from api.readiness import check_schema
from api.settings import Settings
from api.wake import LOOK, queue_name
from worker import metrics
from worker.context import WorkerContext
from worker.heartbeat import Presence
from worker.housekeeping import housekeeping
from worker.tasks import run_jobs

_MEMORY_POLL_SECONDS = 0.1


class WorkerRefused(Exception):
    """The settings let no worker work. The message says what to set."""


def make_app(worker: WorkerContext, presence: Presence) -> Celery:
    """A Celery application with the one task `bitmill.look`, run by one thread: a worker has one device."""
    app = Celery("bitmill.worker", broker=worker.settings.broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        worker_pool="threads",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    if worker.settings.embedded:
        app.conf.broker_transport_options = {"polling_interval": _MEMORY_POLL_SECONDS}

    def run_task() -> None:
        run_jobs(worker, presence)

    app.task(name=LOOK, shared=False)(run_task)
    return app


def options(worker: WorkerContext) -> dict[str, object]:
    """Options of every Celery worker: the queues of its device class and of `any`, no gossip."""
    device_class = worker.identity.device_class
    return {
        "hostname": worker.identity.id,
        "queues": [queue_name(device_class), queue_name("any")],
        "without_gossip": True,
        "without_mingle": True,
        "without_heartbeat": True,
    }


def run_worker(settings: Settings) -> None:
    """`bitmill worker`: serve one device until SIGTERM or SIGINT, then give a running job back to the queue.

    Raises:
        WorkerRefused: the broker is the embedded one, which no other process can reach.
        Unavailable: what `check_schema` and `metrics.exposed` raise.
    """
    if settings.embedded:
        raise WorkerRefused(
            "BITMILL_BROKER_URL is memory://, which lives inside `bitmill serve` and has a worker there. "
            "Set it to a redis:// URL, the same for the API and every worker."
        )
    configure_logging(settings)
    secure_and_log(settings)
    worker = WorkerContext.open(settings)
    check_schema(worker.database.engine)
    presence = Presence(worker)
    app = make_app(worker, presence)

    def stop(**_details: object) -> None:
        worker.stopping.set()

    signals.worker_shutting_down.connect(stop)
    try:
        with metrics.exposed(settings), housekeeping(worker, presence):
            app.Worker(**options(worker), quiet=True, loglevel=settings.log_level.upper()).start()
    finally:
        worker.close()


class CeleryThread:
    """A Celery worker in a thread of this process, for the embedded mode."""

    def __init__(self, app: Celery, worker: WorkerContext) -> None:
        app.set_default()  # Celery runs a task on the default application of the thread that runs it
        self._controller = app.WorkController(**options(worker))
        self._thread = threading.Thread(target=self._controller.start, name="celery", daemon=True)

    def start(self) -> None:
        """Start receiving messages."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether it is still receiving."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop receiving, and return when the running task has ended."""
        state.should_stop = 0
        self._thread.join()
        state.should_stop = None
