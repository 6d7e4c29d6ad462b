"""Messages reach their receivers: signed, at the address that was checked, however slow others are."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import migrations
from api import database as clock
from api.database import Database
from api.projects.repository import get_or_create_project
from api.settings import Settings
from api.webhooks import outbox, service
from api.webhooks.addresses import LookUp, look_up
from api.webhooks.models import Delivery, DeliveryStatus, Webhook
from api.webhooks.signing import new_secret
from tests.support.receiver import CERTIFICATE, Receiver, running_receiver
from worker import deliveries
from worker.deliveries import Sender

ALLOWED = ("127.0.0.1", "hooks.test")
SECONDS = 5


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'bitmill.db'}"
    migrations.upgrade(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


def ping(database: Database, url: str, webhook_id: str = "wh") -> str:
    """A message that is due; its webhook is made if need be."""
    with database.write() as session:
        project = get_or_create_project(session, "default")
        if session.get(Webhook, webhook_id) is None:
            values = {"project_id": project.id, "url": url, "events": [], "all_jobs": True}
            now = clock.now(session)
            session.add(Webhook(id=webhook_id, secret=new_secret(), created_at=now, **values))
            session.flush()
        return service.ping(session, project.id, webhook_id).id


def row(database: Database, delivery_id: str) -> Delivery:
    with database.read() as session:
        return session.get_one(Delivery, delivery_id)


def wait(condition: Callable[[], Any]) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.01)


def send(database: Database, *, look_up: LookUp = look_up, allowed_hosts: tuple[str, ...] = ALLOWED) -> None:
    """Try what is due once."""
    sender = Sender(database, Settings(webhook_allowed_hosts=allowed_hosts), look_up=look_up)
    sender.send_due()
    sender.close()


def test_a_message_is_signed_and_arrives(database: Database, receiver: Receiver) -> None:
    delivery_id = ping(database, f"{receiver.url}?a=b")
    send(database)
    (got,) = receiver.received
    assert got.path == "/hook?a=b"
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["webhook-id"] == delivery_id
    assert abs(int(got.headers["webhook-timestamp"]) - time.time()) < 60
    with database.read() as session:
        secret = session.get_one(Webhook, "wh").secret
    signed = f"{delivery_id}.{got.headers['webhook-timestamp']}.{got.body}".encode()
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert got.headers["webhook-signature"] == f"v1,{digest}"
    assert json.loads(got.body) | {"timestamp": ""} == {
        "type": "ping",
        "timestamp": "",
        "data": {"webhook": "wh"},
    }
    sent = row(database, delivery_id)
    assert (sent.status, sent.attempts, sent.last_status_code) == (DeliveryStatus.DELIVERED, 1, 200)


def test_a_redelivery_is_the_same_message(database: Database, receiver: Receiver) -> None:
    delivery_id = ping(database, receiver.url)
    send(database)
    with database.write() as session:
        service.redeliver(session, get_or_create_project(session, "default").id, "wh", delivery_id)
    send(database)
    one, other = receiver.received
    assert (one.body, one.headers["webhook-id"]) == (other.body, other.headers["webhook-id"])
    assert row(database, delivery_id).attempts == 1


def test_redirects_are_not_followed_and_answers_are_not_kept(database: Database, receiver: Receiver) -> None:
    receiver.status, receiver.headers = 307, {"Location": "/elsewhere", "Set-Cookie": "a=b"}
    delivery_id = ping(database, receiver.url)
    send(database)
    assert [got.path for got in receiver.received] == ["/hook"]
    failed = row(database, delivery_id)
    assert (failed.status, failed.last_status_code) == (DeliveryStatus.PENDING, 307)
    assert failed.last_error == "The receiver answered 307."


def test_proxies_of_the_environment_are_not_used(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    ping(database, receiver.url)
    send(database)
    assert len(receiver.received) == 1


def test_a_receiver_that_is_not_there(database: Database) -> None:
    delivery_id = ping(database, "http://127.0.0.1:1/")
    send(database)
    failed = row(database, delivery_id)
    assert (failed.status, failed.last_status_code) == (DeliveryStatus.PENDING, None)
    assert failed.last_error is not None
    assert failed.last_error.startswith("ConnectError")


def test_a_receiver_that_does_not_answer(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "ATTEMPT_SECONDS", 0.2)
    receiver.hold.set()
    delivery_id = ping(database, receiver.url)
    send(database)
    assert row(database, delivery_id).last_error == "The receiver did not answer within 0.2 seconds."


def test_an_answer_without_an_end_is_left(database: Database, receiver: Receiver) -> None:
    receiver.endless = True
    delivery_id = ping(database, receiver.url)
    send(database)
    assert row(database, delivery_id).status == DeliveryStatus.DELIVERED


class TestAddresses:
    def test_the_url_is_checked_at_each_sending(self, database: Database, receiver: Receiver) -> None:
        """The host was allowed when the webhook was made, and is no longer."""
        delivery_id = ping(database, receiver.url)
        send(database, allowed_hosts=())
        assert receiver.received == []
        assert row(database, delivery_id).last_error == "The URL is not https."

    @pytest.mark.parametrize("answers", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]])
    def test_a_name_that_leads_here_is_not_connected_to(self, database: Database, answers: list[str]) -> None:
        with running_receiver(tls=True) as receiver:
            delivery_id = ping(database, f"https://example.com:{receiver.port}/")
            send(database, look_up=lambda _host: answers, allowed_hosts=())
            assert receiver.names == []
        assert "not public" in (row(database, delivery_id).last_error or "")

    def test_a_name_is_not_looked_up_again_to_connect(self, database: Database, receiver: Receiver) -> None:
        """Its second answer would lead elsewhere; the system's resolver does not know it at all."""
        answers = [["127.0.0.1"], ["10.0.0.1"]]
        delivery_id = ping(database, f"http://hooks.test:{receiver.port}/hook")
        send(database, look_up=lambda _host: answers.pop(0))
        assert len(answers) == 1
        assert row(database, delivery_id).status == DeliveryStatus.DELIVERED
        assert receiver.received[0].headers["host"] == f"hooks.test:{receiver.port}"


class TestTls:
    def test_sni_host_and_certificate_are_the_name_s(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        with running_receiver(tls=True) as receiver:
            delivery_id = ping(database, f"https://hooks.test.:{receiver.port}/hook")
            send(database, look_up=lambda _host: ["127.0.0.1"])
            assert receiver.names == ["hooks.test"]
            assert receiver.received[0].headers["host"] == f"hooks.test:{receiver.port}"
        assert row(database, delivery_id).status == DeliveryStatus.DELIVERED

    @pytest.mark.parametrize(("host", "trusted"), [("127.0.0.1", True), ("hooks.test", False)])
    def test_a_certificate_of_another_name_or_of_nobody_is_refused(
        self, database: Database, monkeypatch: pytest.MonkeyPatch, host: str, trusted: bool
    ) -> None:
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        else:
            monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with running_receiver(tls=True) as receiver:
            delivery_id = ping(database, f"https://{host}:{receiver.port}/hook")
            send(database, look_up=lambda _host: ["127.0.0.1"])
            assert receiver.received == []
        assert "certificate" in (row(database, delivery_id).last_error or "")


class TestThreads:
    def test_a_slow_receiver_holds_up_nobody_else(self, database: Database, receiver: Receiver) -> None:
        receiver.hold.set()
        slow = [ping(database, receiver.url, "slow") for _ in range(6)]
        with running_receiver() as quick_receiver:
            quick = [ping(database, quick_receiver.url, "quick") for _ in range(6)]
            sender = Sender(database, Settings(webhook_allowed_hosts=ALLOWED))
            sender.send_due()
            wait(lambda: len(quick_receiver.received) == 6)
            assert len(receiver.received) <= 2
            receiver.released.set()
            wait(lambda: len(receiver.received) == 6)
            sender.close()
        assert {row(database, each).status for each in slow + quick} == {DeliveryStatus.DELIVERED}

    def test_two_senders_send_each_message_once(self, database: Database, receiver: Receiver) -> None:
        sent = {ping(database, receiver.url, f"wh{number % 5}") for number in range(12)}
        senders = [Sender(database, Settings(webhook_allowed_hosts=ALLOWED)) for _ in range(2)]
        for sender in senders:
            sender.send_due()
        wait(lambda: len(receiver.received) >= 12)
        for sender in senders:
            sender.close()
        assert sorted(got.headers["webhook-id"] for got in receiver.received) == sorted(sent)

    def test_a_closed_sender_sends_nothing(self, database: Database, receiver: Receiver) -> None:
        ping(database, receiver.url)
        sender = Sender(database, Settings(webhook_allowed_hosts=ALLOWED))
        sender.close()
        sender.send_due()
        assert receiver.received == []
        with database.write() as session:
            assert outbox.claim(session) is not None
