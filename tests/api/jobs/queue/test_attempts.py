"""How an attempt ends, and its job with it: success, crashes, preemption, cancels that come in between."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from api.database import Database
from api.errors import Conflict
from api.jobs.ledger.models import AttemptOutcome, Job, JobStatus
from api.jobs.queue import leases
from api.jobs.queue.attempts import AttemptFacts
from api.jobs.queue.leases import CancelWon, Lease, LeaseLost
from api.jobs.service import cancel, retry
from tests.api.jobs.leasing import (
    LEASE,
    attempt_row,
    claim,
    event_types,
    job_row,
    let_lease_run_out,
    make_available,
    must_claim,
    reap,
)


def cancelled_while_running(database: Database, add_job: Callable[..., str]) -> Lease:
    """A worker's lease on a job that was cancelled since it took it."""
    add_job()
    lease = must_claim(database)
    with database.write() as session:
        cancel(session, "p", "job")
    return lease


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
        with database.write() as session:  # the answer to the first time was lost
            leases.succeed(session, lease, {}, "artifacts/job/1/manifest.json")
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
            retry(session, "p", "job", max_queued=None)
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
        lease = cancelled_while_running(database, add_job)
        with database.write() as session:
            assert leases.renew(session, lease, LEASE) == JobStatus.CANCELLING
            leases.mark_cancelled(session, lease)
        assert job_row(database).status == JobStatus.CANCELLED
        assert attempt_row(database, 1).outcome == AttemptOutcome.CANCELLED

    def test_a_cancel_that_came_first_beats_success(
        self, database: Database, add_job: Callable[..., str]
    ) -> None:
        lease = cancelled_while_running(database, add_job)
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
        lease = cancelled_while_running(database, add_job)
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
