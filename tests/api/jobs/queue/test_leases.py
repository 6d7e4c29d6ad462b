"""The worker's side of a job, on a real database: claims, fences, endings, and what the reaper does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from api import database as clock
from api.database import Database
from api.jobs.ledger.models import Attempt, AttemptOutcome, Job, JobEvent, JobLayer, JobStatus
from api.jobs.queue import expiry, leases
from api.jobs.queue.leases import LeaseLost
from api.jobs.queue.workers import WorkerIdentity
from api.jobs.service import cancel, retry
from tests.api.jobs.leasing import (
    CPU,
    GPU,
    HEADER,
    LEASE,
    attempt_row,
    claim,
    event_types,
    job_row,
    layer,
    let_lease_run_out,
    make_available,
    must_claim,
    reap,
)


class TestClaim:
    def test_takes_a_waiting_job_and_tells_it(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        job = job_row(database)
        assert (job.status, job.lease_owner, job.device_class) == (JobStatus.RUNNING, "cpu-1", "cpu")
        assert (lease.attempt, lease.token) == (1, 1)
        assert job.lease_until is not None
        assert job.started_at is not None
        assert job.lease_until - job.started_at == timedelta(seconds=LEASE)
        assert attempt_row(database, 1).outcome is None
        assert event_types(database) == ["attempt_started"]
        assert claim(database) is None

    def test_highest_priority_first_then_oldest(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        with database.read() as session:
            now = clock.now(session)
        add_job("young", created_at=now)
        add_job("old", created_at=now - timedelta(hours=1))
        add_job("urgent", created_at=now + timedelta(hours=1), priority=5)
        assert [must_claim(database).job_id for _ in range(3)] == ["urgent", "old", "young"]

    @pytest.mark.parametrize(
        ("columns", "worker", "fits"),
        [
            ({"required_host_bytes": 1001}, CPU, False),
            ({"required_gpu_bytes": 501}, GPU, False),
            ({"required_gpu_bytes": 501}, CPU, True),
            ({"device_class": "cuda"}, CPU, False),
            ({"device_class": "cuda"}, GPU, True),
            ({"device_class": "cpu"}, GPU, False),
        ],
    )
    def test_only_what_the_worker_can_run(
        self,
        database: Database,
        add_job: Callable[..., str],
        columns: dict[str, Any],
        worker: WorkerIdentity,
        fits: bool,
    ) -> None:
        add_job(**columns)
        assert (claim(database, worker) is not None) == fits

    def test_not_before_its_time_nor_after_its_deadline(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        with database.read() as session:
            now = clock.now(session)
        add_job("early", available_at=now + timedelta(minutes=1))
        add_job("late", queue_deadline=now - timedelta(seconds=1))
        assert claim(database) is None

    def test_the_first_attempt_fixes_the_device_class(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        lease = must_claim(database, GPU)
        with database.write() as session:
            leases.release(session, lease)
        assert claim(database, CPU) is None
        assert claim(database, GPU) is not None

    def test_workers_that_claim_at_once_share_nothing(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        for number in range(12):
            add_job(f"job{number:02}")
        start = threading.Barrier(4)

        def work(name: str) -> list[str]:
            worker = WorkerIdentity(name, "cpu", 1000, 0)
            start.wait()
            taken = []
            while (lease := claim(database, worker)) is not None:
                taken.append(lease.job_id)
            return taken

        with ThreadPoolExecutor(4) as pool:
            taken = [job for jobs in pool.map(work, "abcd") for job in jobs]
        assert sorted(taken) == [f"job{number:02}" for number in range(12)]


class TestFence:
    def test_a_worker_that_lost_its_lease_can_write_nothing(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        zombie = must_claim(database)
        let_lease_run_out(database)
        assert reap(database) == 1
        assert job_row(database).lease_token > zombie.token
        make_available(database)
        heir = must_claim(database, WorkerIdentity("cpu-2", "cpu", 1000, 0))
        assert heir.token > zombie.token
        before = event_types(database)
        writes: list[Callable[[Any], Any]] = [
            lambda s: leases.renew(s, zombie, LEASE),
            lambda s: leases.status_of(s, zombie),
            lambda s: leases.set_phase(s, zombie, "compress"),
            lambda s: leases.save_plan(s, zombie, HEADER),
            lambda s: leases.append_event(s, zombie, "warning", {}),
            lambda s: leases.record_layer(s, zombie, layer(0), "work/x"),
            lambda s: leases.succeed(s, zombie, {}, "manifest"),
            lambda s: leases.fail(s, zombie, AttemptOutcome.CRASHED, "c", "m", retryable=True),
            lambda s: leases.mark_cancelled(s, zombie),
            lambda s: leases.release(s, zombie),
        ]
        for write in writes:
            with pytest.raises(LeaseLost), database.write() as session:
                write(session)
        job = job_row(database)
        assert (job.status, job.lease_owner, job.manifest_key) == (JobStatus.RUNNING, "cpu-2", None)
        assert event_types(database) == before

    def test_the_lease_is_gone_between_reaper_and_next_claim_too(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        zombie = must_claim(database)
        let_lease_run_out(database)
        reap(database)
        with pytest.raises(LeaseLost), database.write() as session:
            leases.succeed(session, zombie, {}, "manifest")

    def test_renewing_outlives_the_reaper(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        let_lease_run_out(database)
        with database.write() as session:
            assert leases.renew(session, lease, LEASE) == JobStatus.RUNNING
        assert reap(database) == 0

    def test_a_failed_transaction_leaves_no_gap(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        lease = must_claim(database)

        def tell_and_break() -> None:
            with database.write() as session:
                leases.append_event(session, lease, "warning", {})
                raise RuntimeError

        with pytest.raises(RuntimeError):
            tell_and_break()
        with database.write() as session:
            assert leases.append_event(session, lease, "warning", {}) == 2

    def test_seq_has_no_gap_under_concurrent_writers(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        lease = must_claim(database)

        def tell(_: int) -> None:
            with database.write() as session:
                leases.append_event(session, lease, "warning", {})

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(tell, range(40)))
        assert len(event_types(database)) == 41


class TestLayers:
    def test_row_and_event_together_once(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            leases.save_plan(session, lease, HEADER)
            leases.record_layer(session, lease, layer(0), "work/a")
        with database.write() as session:
            leases.record_layer(session, lease, layer(0), "work/b")
        with database.read() as session:
            rows = leases.finished_layers(session, "job", HEADER["work_key"])
            event = session.get_one(JobEvent, ("job", 2))
        assert [(row.layer, row.store_key, row.sha256) for row in rows] == [(0, "work/b", "a" * 64)]
        assert event.type == "layer_solved"
        assert "entry" not in event.data
        assert event_types(database).count("layer_solved") == 1
        assert job_row(database).layers_done == 1

    def test_a_later_attempt_finds_them(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            leases.save_plan(session, lease, HEADER)
            leases.record_layer(session, lease, layer(0), "work/a")
            leases.release(session, lease)
        with database.write() as session:
            claimed = leases.claim(session, CPU, LEASE)
        assert claimed is not None
        lease, job = claimed
        assert job.resolved_plan == HEADER
        assert job.dataset is None
        with database.write() as session:
            leases.save_plan(session, lease, {**HEADER, "fingerprint": "0" * 64})
        assert job_row(database).fingerprint == HEADER["fingerprint"]
        assert job_row(database).layers_done == 1

    def test_another_work_key_starts_over(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            leases.save_plan(session, lease, HEADER)
            leases.record_layer(session, lease, layer(0), "work/a")
            leases.save_plan(session, lease, {**HEADER, "work_key": "0" * 64})
        assert job_row(database).layers_done == 0
        assert event_types(database)[-1] == "warning"
        with database.read() as session:
            assert leases.finished_layers(session, "job", "0" * 64) == []

    def test_a_layer_without_a_plan_is_a_bug(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with pytest.raises(ValueError, match="resolved plan"), database.write() as session:
            leases.record_layer(session, lease, layer(0), "work/a")


class TestReaper:
    def test_a_lost_lease_waits_again_and_counts(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job(max_attempts=2)
        must_claim(database)
        assert reap(database) == 0
        let_lease_run_out(database)
        assert reap(database) == 1
        assert reap(database) == 0
        assert job_row(database).status == JobStatus.QUEUED
        assert attempt_row(database, 1).outcome == AttemptOutcome.LEASE_LOST
        make_available(database)
        must_claim(database)
        let_lease_run_out(database)
        reap(database)
        job = job_row(database)
        assert (job.status, job.error_code) == (JobStatus.FAILED, "lease_lost")

    def test_a_wait_past_its_limit_expires(self, database: Database, add_job: Callable[..., str]) -> None:
        with database.read() as session:
            past = clock.now(session) - timedelta(seconds=1)
        add_job("late", queue_deadline=past, max_queue_seconds=1)
        add_job("patient")
        assert reap(database) == 1
        job = job_row(database, "late")
        assert (job.status, job.error_code) == (JobStatus.EXPIRED, "max_queue_seconds")
        assert event_types(database, "late") == ["job_expired"]
        assert job_row(database, "patient").status == JobStatus.QUEUED
        with database.write() as session:
            retry(session, "p", "late", max_queued=None)
        assert must_claim(database).job_id == "late"

    def test_two_reapers_at_once_count_once(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        must_claim(database)
        let_lease_run_out(database)
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(lambda _: reap(database), range(4))) == 1
        assert job_row(database).attempts_counted == 1

    def test_the_embedded_start_gives_back_everything_uncounted(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job("a", max_attempts=1)
        add_job("b")
        lease = must_claim(database)
        must_claim(database)
        with database.write() as session:
            cancel(session, "p", "b")
            assert expiry.release_all(session) == 2
        assert job_row(database, "a").status == JobStatus.QUEUED
        assert job_row(database, "a").attempts_counted == 0
        assert job_row(database, "b").status == JobStatus.CANCELLED
        with pytest.raises(LeaseLost), database.write() as session:
            leases.renew(session, lease, LEASE)


def test_a_transaction_reaps_no_more_than_others_can_wait_for(
    database: Database, add_job: Callable[..., str]
) -> None:
    with database.read() as session:
        past = clock.now(session) - timedelta(hours=1)
        assert not expiry.has_expired(session)
    add_job("lost", status=JobStatus.CANCELLING, lease_until=past, attempts_made=1)
    with database.write() as session:
        session.add(
            Attempt(job_id="lost", number=1, token=0, worker_id="gone", device_class="cpu", started_at=past)
        )
    for number in range(expiry.REAPED_AT_ONCE + 1):
        add_job(f"job{number}", queue_deadline=past)
    with database.read() as session:
        assert expiry.has_expired(session)
    assert [reap(database) for _ in range(3)] == [1 + expiry.REAPED_AT_ONCE, 1, 0]
    with database.read() as session:
        assert not expiry.has_expired(session)


class TestAnAnswerThatWasLost:
    def test_a_worker_that_runs_nothing_gives_back_its_own_uncounted(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        """It never heard of its claim."""
        add_job("a")
        add_job("b")
        must_claim(database)
        must_claim(database, WorkerIdentity("cpu-2", "cpu", 1000, 0))
        with database.write() as session:
            assert expiry.release_held(session, CPU.id) == 1
        job = job_row(database, "a")
        assert (job.status, job.attempts_counted) == (JobStatus.QUEUED, 0)
        assert attempt_row(database, 1, "a").outcome == AttemptOutcome.PREEMPTED
        assert job_row(database, "b").lease_owner == "cpu-2"


def test_queued_by_device_counts_what_could_be_claimed(
    database: Database, add_job: Callable[..., str]
) -> None:
    with database.read() as session:
        now = clock.now(session)
    add_job("a")
    add_job("b", device_class="cuda")
    add_job("c", available_at=now + timedelta(hours=1))
    with database.read() as session:
        assert leases.queued_by_device(session) == {"any": 1, "cuda": 1}


def test_deleting_a_job_takes_its_rows_along(database: Database, add_job: Callable[..., str]) -> None:
    add_job()
    lease = must_claim(database)
    with database.write() as session:
        leases.save_plan(session, lease, HEADER)
        leases.record_layer(session, lease, layer(0), "work/a")
    with database.write() as session:
        session.delete(session.get_one(Job, "job"))
    with database.read() as session:
        for table in (Attempt, JobEvent, JobLayer):
            assert session.scalars(select(table)).all() == []
