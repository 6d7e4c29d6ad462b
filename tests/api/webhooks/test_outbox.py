"""Messages are written with what they tell of, go to one sender at a time, and are sent until they arrive."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from api import database as clock
from api.database import Database
from api.jobs import service
from api.jobs.ledger.models import AttemptOutcome, Job, JobEvent, JobStatus
from api.jobs.queue import leases
from api.webhooks import outbox, repository
from api.webhooks.models import Delivery, DeliveryStatus, Webhook, WebhookEvent
from api.webhooks.outbox import RETRY_SECONDS, Answer, Message
from tests.api.jobs.leasing import let_lease_run_out, make_available, must_claim, reap

AddJob = Callable[..., str]
AddWebhook = Callable[..., str]

RECIPE = {"steps": [{"type": "rtn", "scheme": "W8A8"}]}


@pytest.fixture
def add_webhook(database: Database) -> AddWebhook:
    """Adds a webhook of the jobs' project and returns its id; keywords change its columns."""

    def add(id: str = "wh", **columns: Any) -> str:
        with database.write() as session:
            defaults: dict[str, Any] = {
                "project_id": "p",
                "url": "https://example.com/",
                "events": list(WebhookEvent),
                "all_jobs": True,
                "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
                "created_at": clock.now(session),
            }
            session.add(Webhook(id=id, **defaults | columns))
        return id

    return add


@pytest.fixture
def job(add_job: AddJob) -> str:
    return add_job(recipe=RECIPE)


def deliveries(database: Database) -> list[Delivery]:
    with database.read() as session:
        return list(session.scalars(select(Delivery).order_by(Delivery.created_at, Delivery.webhook_id)))


def bodies(database: Database) -> list[dict[str, Any]]:
    with database.read() as session:
        return [
            json.loads(body)
            for body in session.scalars(
                select(Delivery.body).order_by(Delivery.created_at, Delivery.webhook_id)
            )
        ]


def told(database: Database) -> list[tuple[str, str]]:
    """Type, and the status of the job that came with it."""
    return [(body["type"], body["data"]["job"]["status"]) for body in bodies(database)]


def must_take(database: Database) -> Message:
    with database.write() as session:
        message = outbox.claim(session)
    assert message is not None
    return message


def take_nothing(database: Database) -> None:
    with database.write() as session:
        assert outbox.claim(session) is None


def settle(database: Database, message: Message, answer: Answer) -> Delivery:
    with database.write() as session:
        outbox.settle(session, message, answer)
    with database.read() as session:
        return session.get_one(Delivery, message.id)


def now(database: Database) -> datetime:
    with database.read() as session:
        return clock.now(session)


def change(database: Database, **columns: Any) -> None:
    """Change all messages."""
    with database.write() as session:
        session.execute(update(Delivery).values(**columns))


def make_due(database: Database) -> None:
    """Skip the time until the next attempt."""
    change(database, next_attempt_at=now(database))


class TestAnnounce:
    def test_success(self, database: Database, job: str, add_webhook: AddWebhook) -> None:
        add_webhook()
        lease = must_claim(database)
        with database.write() as session:
            before = session.get_one(Job, job)  # which the session remembers
            assert before.status == JobStatus.RUNNING
            leases.succeed(session, lease, {"totals": {}}, "manifest")
        assert told(database) == [("attempt.started", "running"), ("job.succeeded", "succeeded")]
        last = bodies(database)[-1]
        assert last["data"]["job"]["id"] == job
        assert last["data"]["job"]["finished_at"]
        assert "whsec_" not in json.dumps(last)
        with database.read() as session:
            event = session.scalars(select(JobEvent).order_by(JobEvent.seq)).all()[-1]
        assert last["data"]["job"]["event_seq"] == event.seq
        assert datetime.fromisoformat(last["timestamp"]) == event.at

    @pytest.mark.usefixtures("job")
    def test_failure(self, database: Database, add_webhook: AddWebhook) -> None:
        add_webhook(events=["job_failed"])
        lease = must_claim(database)
        with database.write() as session:
            leases.fail(session, lease, AttemptOutcome.FAILED, "nan", "not a number", retryable=False)
        assert told(database) == [("job.failed", "failed")]
        assert bodies(database)[0]["data"]["job"]["error"] == {"code": "nan", "message": "not a number"}

    def test_cancels(self, database: Database, add_job: AddJob, job: str, add_webhook: AddWebhook) -> None:
        add_webhook(events=["job_cancelled"])
        lease = must_claim(database)
        with database.write() as session:
            service.cancel(session, "p", job)
        assert told(database) == []
        with database.write() as session:
            leases.mark_cancelled(session, lease)
        add_job("waiting", recipe=RECIPE)
        with database.write() as session:
            service.cancel(session, "p", "waiting")
        assert told(database) == [("job.cancelled", "cancelled")] * 2

    def test_expiry_lost_leases_and_retries(
        self, database: Database, add_job: AddJob, job: str, add_webhook: AddWebhook
    ) -> None:
        add_webhook(events=["job_queued", "job_failed", "job_expired"])
        for _ in range(3):
            must_claim(database)
            let_lease_run_out(database)
            reap(database)
            make_available(database)
        with database.write() as session:
            service.retry(session, "p", job, max_queued=None)
        add_job("late", recipe=RECIPE, queue_deadline=now(database) - timedelta(seconds=1))
        reap(database)
        assert told(database) == [
            ("job.failed", "failed"),
            ("job.queued", "queued"),
            ("job.expired", "expired"),
        ]

    def test_who_is_told(
        self, database: Database, job: str, add_job: AddJob, add_webhook: AddWebhook
    ) -> None:
        add_webhook("all")
        add_webhook("called", all_jobs=False)
        add_webhook("never", all_jobs=False)
        add_webhook("succeeded", events=["job_succeeded"])
        add_webhook("disabled", disabled_at=now(database))
        add_job("other", recipe=RECIPE, callback="called")
        for job_id in (job, "other"):
            with database.write() as session:
                service.cancel(session, "p", job_id)
        assert [(each.job_id, each.webhook_id) for each in deliveries(database)] == [
            (job, "all"),
            ("other", "all"),
            ("other", "called"),
        ]

    def test_a_callback_to_a_webhook_of_all_jobs_is_one_message(
        self, database: Database, add_job: AddJob, add_webhook: AddWebhook
    ) -> None:
        add_job(recipe=RECIPE, callback=add_webhook())
        with database.write() as session:
            service.cancel(session, "p", "job")
        assert len(deliveries(database)) == 1

    def test_what_is_rolled_back_is_not_told(
        self, database: Database, job: str, add_webhook: AddWebhook
    ) -> None:
        add_webhook()
        with suppress(RuntimeError), database.write() as session:
            service.cancel(session, "p", job)
            raise RuntimeError
        assert deliveries(database) == []

    def test_it_goes_with_its_job_and_with_its_webhook(
        self, database: Database, job: str, add_webhook: AddWebhook
    ) -> None:
        add_webhook("one")
        add_webhook("other")
        with database.write() as session:
            service.cancel(session, "p", job)
            repository.remove(session, "p", "one")
        (left,) = deliveries(database)
        assert left.webhook_id == "other"
        with database.write() as session:
            session.delete(session.get_one(Job, job))
        assert deliveries(database) == []


@pytest.fixture
def pinged(database: Database, job: str, add_webhook: AddWebhook) -> str:
    """A message of one webhook, due at once."""
    add_webhook()
    with database.write() as session:
        service.cancel(session, "p", job)
    return deliveries(database)[0].id


@pytest.mark.usefixtures("pinged")
class TestClaimAndSettle:
    def test_a_claimed_message_is_nobody_else_s(self, database: Database, pinged: str) -> None:
        message = must_take(database)
        assert (message.id, message.attempt, message.url) == (pinged, 1, "https://example.com/")
        assert "whsec" not in repr(message)
        take_nothing(database)

    def test_senders_at_once_take_different_ones(self, database: Database, add_job: AddJob) -> None:
        for number in range(11):
            add_job(f"job{number}", recipe=RECIPE)
            with database.write() as session:
                service.cancel(session, "p", f"job{number}")
        with ThreadPoolExecutor(4) as pool:
            taken = [each.id for each in pool.map(lambda _: must_take(database), range(12))]
        assert len(set(taken)) == 12
        take_nothing(database)

    def test_the_message_of_a_sender_that_died_is_due_again(self, database: Database, pinged: str) -> None:
        must_take(database)
        make_due(database)
        again = must_take(database)
        assert (again.id, again.attempt) == (pinged, 2)

    def test_an_attempt_that_was_overtaken_writes_nothing(self, database: Database) -> None:
        slow = must_take(database)
        make_due(database)
        must_take(database)
        late = settle(database, slow, Answer(500))
        assert (late.status, late.last_status_code, late.attempts) == (DeliveryStatus.PENDING, None, 2)

    def test_busy_webhooks_are_left_alone(self, database: Database) -> None:
        with database.write() as session:
            assert outbox.claim(session, busy=["wh"]) is None
            assert outbox.claim(session, busy=["other"]) is not None

    @pytest.mark.parametrize("status", [200, 204, 299])
    def test_2xx_is_arrival(self, database: Database, status: int) -> None:
        done = settle(database, must_take(database), Answer(status))
        assert (done.status, done.last_status_code, done.last_error) == ("delivered", status, None)
        assert done.delivered_at is not None
        assert done.next_attempt_at is None
        take_nothing(database)

    def test_anything_else_is_tried_again_on_the_standard_s_schedule(self, database: Database) -> None:
        answers = [Answer(500), Answer(302), Answer(error="no answer"), *[Answer(404)] * 6]
        for answer, seconds in zip(answers, RETRY_SECONDS, strict=True):
            message = must_take(database)
            tried = settle(database, message, answer)
            assert tried.status == DeliveryStatus.PENDING
            assert tried.last_error == (answer.error or f"The receiver answered {answer.status_code}.")
            assert tried.next_attempt_at is not None
            waits = (tried.next_attempt_at - message.at).total_seconds()
            assert seconds <= waits <= seconds * 1.2 + 1
            take_nothing(database)
            make_due(database)
        last = settle(database, must_take(database), Answer(503))
        assert (last.status, last.attempts, last.next_attempt_at) == ("failed", 10, None)
        take_nothing(database)

    def test_gone_disables_the_webhook(self, database: Database, add_job: AddJob) -> None:
        add_job("second", recipe=RECIPE)
        with database.write() as session:
            service.cancel(session, "p", "second")
        gone = settle(database, must_take(database), Answer(410))
        assert (gone.status, gone.last_status_code) == ("failed", 410)
        assert [each.status for each in deliveries(database)] == ["failed", "failed"]
        assert "410" in (deliveries(database)[1].last_error or "")
        add_job("third", recipe=RECIPE)
        with database.write() as session:
            assert session.get_one(Webhook, "wh").disabled_at is not None
            service.cancel(session, "p", "third")
        assert len(deliveries(database)) == 2

    def test_only_old_messages_that_were_settled_are_forgotten(self, database: Database) -> None:
        def forget(days: float) -> int:
            with database.write() as session:
                outbox.forget(session, days, 10)
            return len(deliveries(database))

        change(database, created_at=now(database) - timedelta(days=31))
        assert forget(30) == 1  # still to be sent
        settle(database, must_take(database), Answer(200))
        assert forget(32) == 1
        with database.write() as session:
            assert outbox.forget(session, 30, 0) == 0
        assert forget(30) == 0
