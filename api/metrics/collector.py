"""What the database knows, asked when Prometheus asks: jobs, queues, attempts, workers and deliveries.

Only labels with few values that the code knows: never a project, a model or a label of a job. What there is
none of is 0, so that alerts have a value to look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

import structlog
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from sqlalchemy.exc import SQLAlchemyError

from api import database as clock
from api.database import Database
from api.jobs.ledger.models import ACTIVE, TERMINAL, AttemptOutcome, DeviceClass, JobStatus
from api.jobs.queue import workers
from api.metrics import repository
from api.metrics.repository import Deliveries, Ended, Held
from api.probes import Probe
from api.webhooks.models import DeliveryStatus

SCRAPE_SECONDS = 5.0
"""How long a scrape waits for the database."""
RECENT = timedelta(hours=1)
"""How far back ends are counted. All of them would take ever longer, and shrink with deleted jobs."""
_DEVICE_CLASSES: tuple[DeviceClass, ...] = get_args(DeviceClass)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Seen:
    """One look at the database. alive: workers by (device class, whether they are busy)."""

    now: datetime
    held: list[Held]
    ended: list[Ended]
    attempts: dict[AttemptOutcome, int]
    alive: Counter[tuple[str, bool]]
    deliveries: list[Deliveries]


class ServiceCollector:
    """All gauges of the service. lease_seconds: a worker is alive if its last heartbeat is no older."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._probe = Probe("metrics", self._read)

    def collect(self) -> Iterator[Metric]:
        """Only `bitmill_database_up`, 0, where the database does not answer in time."""
        try:
            seen = self._probe.begin().result(SCRAPE_SECONDS)
        except (SQLAlchemyError, TimeoutError) as error:
            log.warning("metrics_incomplete", error=type(error).__name__)
            yield _database_up(False)
            return
        yield _database_up(True)
        yield from _families(seen)

    def _read(self) -> Seen:
        with self._database.read() as session:
            now = clock.now(session)
            alive = workers.list_alive(session, self._lease_seconds)
            return Seen(
                now=now,
                held=list(repository.jobs_held(session)),
                ended=list(repository.jobs_ended(session, now - RECENT)),
                attempts=repository.attempts_ended(session, now - RECENT),
                alive=Counter((worker.device_class, worker.job_id is not None) for worker, _ in alive),
                deliveries=list(repository.deliveries(session, now)),
            )


def _families(seen: Seen) -> Iterator[Metric]:
    both = ("status", "device_class")
    held = {(each.status, each.device_class): each for each in seen.held}
    yield _gauge(
        "bitmill_jobs",
        "Jobs that wait and run, by device class.",
        both,
        {
            (status.value, kind): held[status, kind].jobs if (status, kind) in held else 0
            for status in (JobStatus.QUEUED, *ACTIVE)
            for kind in _DEVICE_CLASSES
        },
    )
    waiting = {kind: held.get((JobStatus.QUEUED, kind)) for kind in _DEVICE_CLASSES}
    yield _gauge(
        "bitmill_queue_oldest_job_age_seconds",
        "How long the first of the waiting jobs could have been taken; 0 where none waits.",
        ("device_class",),
        {
            (kind,): max(0.0, (seen.now - first.since).total_seconds()) if first else 0
            for kind, first in waiting.items()
        },
    )
    ended = {(each.status, each.device_class): each.jobs for each in seen.ended}
    yield _gauge(
        "bitmill_jobs_ended_last_hour",
        "Jobs that ended in the last hour, by how.",
        both,
        {
            (status.value, kind): ended.get((status, kind), 0)
            for status in TERMINAL
            for kind in _DEVICE_CLASSES
        },
    )
    yield _gauge(
        "bitmill_attempts_ended_last_hour",
        "Attempts that ended in the last hour, by outcome.",
        ("outcome",),
        {(outcome.value,): seen.attempts.get(outcome, 0) for outcome in AttemptOutcome},
    )
    yield _gauge(
        "bitmill_workers",
        "Workers that are alive, by what they do.",
        ("device_class", "state"),
        {
            (kind, state): seen.alive[kind, state == "busy"]
            for kind in ("cpu", "cuda")
            for state in ("idle", "busy")
        },
    )
    yield _gauge(
        "bitmill_webhook_deliveries",
        "Messages to webhooks: due now, to be tried again later, and given up but still in the log.",
        ("state",),
        {(state,): count for state, count in _by_state(seen.deliveries).items()},
    )


def _by_state(found: list[Deliveries]) -> dict[str, int]:
    counts = {"due": 0, "later": 0, "failed": 0}
    for each in found:
        if each.status == DeliveryStatus.FAILED:
            counts["failed"] = each.messages
        else:
            counts |= {"due": each.due, "later": each.messages - each.due}
    return counts


def _database_up(up: bool) -> Metric:
    return _gauge("bitmill_database_up", "Whether the database answered in time.", (), {(): up})


def _gauge(name: str, about: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, about, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
