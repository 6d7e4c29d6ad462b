"""The worker's side of a job, on a real database: claims, fences, endings, and what the reaper does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from api import database as clock
from api.database import Database
from api.errors import Conflict
from api.jobs import leases
from api.jobs.leases import AttemptFacts, CancelWon, Lease, LeaseLost, WorkerIdentity
from api.jobs.models import Attempt, AttemptOutcome, Job, JobEvent, JobLayer, JobStatus
from api.jobs.service import cancel, retry
from api.projects.models import Project

CPU = WorkerIdentity("cpu-1", "cpu", host_bytes=1000, gpu_bytes=0)
GPU = WorkerIdentity("gpu-1", "cuda", host_bytes=1000, gpu_bytes=500)
LEASE = 90.0
HEADER: dict[str, Any] = {"type": "plan", "work_key": "w" * 64, "fingerprint": "f" * 64, "resolved": {}}


@pytest.fixture
def add_job(database: Database) -> Callable[..., str]:
    """Adds a queued job and returns its id; keywords change its columns."""
    with database.write() as session:
        session.add(Project(id="p", name="p", created_at=clock.now(session)))

    def add(id: str = "job", **columns: Any) -> str:
        with database.write() as session:
            now = clock.now(session)
            defaults: dict[str, Any] = {
                "project_id": "p",
                "labels": {},
                "priority": 0,
                "model": "m",
                "source": "/m",
                "scheme": "W4A16",
                "method": "rtn",
                "recipe": {},
                "calibration": {},
                "evaluation": {},
                "plan": {},
                "max_attempts": 3,
                "device_class": "any",
                "required_host_bytes": 100,
                "required_gpu_bytes": 100,
                "status": JobStatus.QUEUED,
                "layers_total": 2,
                "created_at": now,
                "available_at": now,
            }
            session.add(Job(id=id, **{**defaults, **columns}))
        return id

    return add


def claim(database: Database, worker: WorkerIdentity = CPU) -> Lease | None:
    with database.write() as session:
        claimed = leases.claim(session, worker, LEASE)
        return claimed[0] if claimed else None


def must_claim(database: Database, worker: WorkerIdentity = CPU) -> Lease:
    lease = claim(database, worker)
    assert lease is not None
    return lease


def job_row(database: Database, job_id: str = "job") -> Job:
    with database.read() as session:
        return session.get_one(Job, job_id)


def attempt_row(database: Database, number: int, job_id: str = "job") -> Attempt:
    with database.read() as session:
        return session.get_one(Attempt, (job_id, number))


def event_types(database: Database, job_id: str = "job") -> list[str]:
    """Types in order; fails if a seq is missing."""
    with database.read() as session:
        events = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
        ).all()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.type for event in events]


def let_lease_run_out(database: Database, job_id: str = "job") -> None:
    with database.write() as session:
        past = clock.now(session) - timedelta(seconds=1)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=past))


def make_available(database: Database, job_id: str = "job") -> None:
    """Skip the delay before the next attempt."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(available_at=clock.now(session)))


def reap(database: Database) -> int:
    with database.write() as session:
        return leases.reap(session)


def layer(number: int) -> dict[str, Any]:
    entry = {"layer": number, "file": f"{number}.safetensors", "sha256": "a" * 64, "size": 7, "report": {}}
    return {
        "layer": number,
        "layers_total": 2,
        "relative_error": 0.1,
        "seconds": 1.0,
        "eta_seconds": 1.0,
        "entry": entry,
    }


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
            lambda s: leases.held(s, zombie),
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


class TestEndings:
    def test_success(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            facts = AttemptFacts(peak_host_bytes=5)
            leases.succeed(session, lease, {"totals": {"seconds": 1}}, "artifacts/job/1/manifest.json", facts)
        job = job_row(database)
        assert (job.status, job.manifest_key) == (JobStatus.SUCCEEDED, "artifacts/job/1/manifest.json")
        assert (job.lease_owner, job.lease_until) == (None, None)
        attempt = attempt_row(database, 1)
        assert (attempt.outcome, attempt.peak_host_bytes) == (AttemptOutcome.SUCCEEDED, 5)
        assert attempt.seconds is not None
        assert attempt.seconds >= 0
        assert event_types(database) == ["attempt_started", "attempt_ended", "job_succeeded"]
        with pytest.raises(LeaseLost), database.write() as session:
            leases.succeed(session, lease, {}, "again")

    def test_crashes_are_retried_until_max_attempts(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        for number in (1, 2, 3):
            lease = must_claim(database)
            assert lease.attempt == number
            with database.write() as session:
                facts = AttemptFacts(exit_signal=9)
                leases.fail(
                    session, lease, AttemptOutcome.CRASHED, "engine_crashed", "m", retryable=True, facts=facts
                )
            if number < 3:
                assert claim(database) is None  # it waits a moment first
                make_available(database)
        job = job_row(database)
        assert (job.status, job.error_code) == (JobStatus.FAILED, "engine_crashed")
        assert attempt_row(database, 2).exit_signal == 9
        assert event_types(database)[-2:] == ["attempt_ended", "job_failed"]

    def test_what_cannot_succeed_fails_at_once(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            status = leases.fail(
                session, lease, AttemptOutcome.FAILED, "nan", "m", retryable=False, report={"a": 1}
            )
        assert status == JobStatus.FAILED
        with database.read() as session:
            assert session.get_one(Job, "job").report == {"a": 1}

    def test_preempted_attempts_do_not_count(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job(max_attempts=1)
        for _ in range(3):
            lease = must_claim(database)
            with database.write() as session:
                assert leases.release(session, lease) == JobStatus.QUEUED
            assert job_row(database).lease_token > lease.token
        job = job_row(database)
        assert (job.attempts_made, job.attempts_counted) == (3, 0)
        assert attempt_row(database, 3).outcome == AttemptOutcome.PREEMPTED

    def test_retry_gives_all_attempts_anew(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job(max_attempts=1)
        lease = must_claim(database)
        with database.write() as session:
            leases.fail(session, lease, AttemptOutcome.CRASHED, "c", "m", retryable=True)
        assert job_row(database).status == JobStatus.FAILED
        with database.write() as session:
            retry(session, "p", "job")
        job = job_row(database)
        assert (job.status, job.attempts_counted, job.error_code) == (JobStatus.QUEUED, 0, None)
        again = must_claim(database)
        assert again.attempt == 2
        assert again.token > lease.token


class TestCancel:
    def test_a_waiting_job_ends_at_once(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        with database.write() as session:
            cancel(session, "p", "job")
        assert job_row(database).status == JobStatus.CANCELLED
        assert claim(database) is None
        assert event_types(database) == ["cancel_requested", "job_cancelled"]

    def test_the_worker_learns_it_at_its_heartbeat(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            cancel(session, "p", "job")
        with database.write() as session:
            assert leases.renew(session, lease, LEASE) == JobStatus.CANCELLING
            leases.mark_cancelled(session, lease)
        assert job_row(database).status == JobStatus.CANCELLED
        assert attempt_row(database, 1).outcome == AttemptOutcome.CANCELLED

    def test_a_cancel_that_came_first_beats_success(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            cancel(session, "p", "job")
        with pytest.raises(CancelWon), database.write() as session:
            leases.succeed(session, lease, {}, "manifest")
        with database.write() as session:
            leases.mark_cancelled(session, lease)
        job = job_row(database)
        assert (job.status, job.manifest_key) == (JobStatus.CANCELLED, None)

    def test_mark_cancelled_needs_a_cancel(self, database: Database, add_job: Callable[..., str]) -> None:
        add_job()
        lease = must_claim(database)
        with pytest.raises(LeaseLost), database.write() as session:
            leases.mark_cancelled(session, lease)

    @pytest.mark.parametrize("end", ["fail", "release", "reap"])
    def test_any_other_ending_of_a_cancelled_attempt_is_cancelled(
        self, database: Database, add_job: Callable[..., str], end: str
    ) -> None:
        add_job()
        lease = must_claim(database)
        with database.write() as session:
            cancel(session, "p", "job")
        if end == "reap":
            let_lease_run_out(database)
            reap(database)
        else:
            with database.write() as session:
                if end == "fail":
                    leases.fail(session, lease, AttemptOutcome.CRASHED, "c", "m", retryable=True)
                else:
                    leases.release(session, lease)
        assert job_row(database).status == JobStatus.CANCELLED
        assert event_types(database)[-1] == "job_cancelled"

    def test_cancel_and_success_at_once_end_in_exactly_one(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        outcomes: Counter[str] = Counter()
        for number in range(20):
            job_id = add_job(f"job{number}")
            lease = must_claim(database)
            start = threading.Barrier(2)

            def finish(lease: Lease = lease, start: threading.Barrier = start) -> str:
                start.wait()
                try:
                    with database.write() as session:
                        leases.succeed(session, lease, {}, "manifest")
                    return "succeeded"
                except CancelWon:
                    with database.write() as session:
                        leases.mark_cancelled(session, lease)
                    return "cancelled"

            def stop(job_id: str = job_id, start: threading.Barrier = start) -> None:
                start.wait()
                with suppress(Conflict), database.write() as session:
                    cancel(session, "p", job_id)

            with ThreadPoolExecutor(2) as pool:
                finished, stopped = pool.submit(finish), pool.submit(stop)
                outcome = finished.result()
                stopped.result()
            job = job_row(database, job_id)
            assert job.status == outcome
            assert (job.manifest_key is not None) == (outcome == "succeeded")
            assert event_types(database, job_id).count("attempt_ended") == 1
            outcomes[outcome] += 1
        assert sum(outcomes.values()) == 20


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
            retry(session, "p", "late")
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
            assert leases.release_all(session) == 2
        assert job_row(database, "a").status == JobStatus.QUEUED
        assert job_row(database, "a").attempts_counted == 0
        assert job_row(database, "b").status == JobStatus.CANCELLED
        with pytest.raises(LeaseLost), database.write() as session:
            leases.renew(session, lease, LEASE)


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
