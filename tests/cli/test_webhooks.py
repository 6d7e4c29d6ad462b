"""`bitmill webhooks`, against a real server whose worker sends to a real receiver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.conftest import Server
from tests.support.receiver import Receiver, running_receiver

SECONDS = 30


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


def delivered(server: Server, webhook_id: str) -> list[dict[str, Any]]:
    """What was sent there, once nothing is pending."""
    give_up = time.monotonic() + SECONDS
    while True:
        log: list[dict[str, Any]] = server.bitmill("webhooks", "deliveries", webhook_id, "--json").json[
            "deliveries"
        ]
        if all(each["status"] == "delivered" for each in log):
            return log
        assert time.monotonic() < give_up, log


def test_a_callback_is_called_and_called_again(server: Server, receiver: Receiver) -> None:
    hook = server.bitmill("webhooks", "add", receiver.url, "--callback-only", "--json").json
    for callback in ((), ("--callback", hook["id"])):
        job = server.submit("--device-class", "cuda", *callback, "--json").json["id"]
        server.bitmill("cancel", job)
    (told,) = delivered(server, hook["id"])
    (got,) = receiver.received
    body = json.loads(got.body)
    assert (body["type"], body["data"]["job"]["id"]) == ("job.cancelled", job)
    assert body["data"]["job"]["status"] == "cancelled"

    again = server.bitmill("webhooks", "redeliver", hook["id"], told["id"])
    assert (again.code, again.out) == (0, f"{told['id']} is pending.\n")
    delivered(server, hook["id"])
    assert [each.headers["webhook-id"] for each in receiver.received] == [told["id"]] * 2
    table = server.bitmill("webhooks", "deliveries", hook["id"], "--job", job).out
    assert told["id"] in table
    assert "job_cancelled" in table


def test_webhooks_are_made_listed_pinged_and_removed(server: Server, receiver: Receiver) -> None:
    added = server.bitmill("webhooks", "add", receiver.url, "--event", "job_failed", "--description", "mine")
    hook_id, secret = added.out.split("\nsecret: ")
    assert (added.code, secret[:6]) == (0, "whsec_")
    (listed,) = [
        hook
        for hook in server.bitmill("webhooks", "list", "--json").json["webhooks"]
        if hook["id"] == hook_id
    ]
    assert (listed["events"], listed["all_jobs"], listed["description"]) == (["job_failed"], True, "mine")
    assert hook_id in server.bitmill("webhooks", "list").out
    assert server.bitmill("webhooks", "ping", hook_id).code == 0
    assert [each["event"] for each in delivered(server, hook_id)] == ["ping"]
    assert server.bitmill("webhooks", "remove", hook_id, "--json").json == {"removed": hook_id}
    gone = server.bitmill("webhooks", "deliveries", hook_id, "--json")
    assert (gone.code, gone.json["error"]["code"]) == (4, "webhook_not_found")


def test_an_unsafe_url_is_refused(server: Server) -> None:
    refused = server.bitmill("webhooks", "add", "https://169.254.169.254/latest", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (4, "webhook_url_not_allowed")
