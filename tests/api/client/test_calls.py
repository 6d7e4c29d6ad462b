"""Every call of the API, by both clients."""

from __future__ import annotations

import asyncio
import csv
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from api.client import ApiError, AsyncClient
from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue import leases
from tests.api.artifacts.conftest import publish
from tests.api.client.conftest import Connect, Served
from tests.api.jobs.leasing import start
from tests.api.test_openapi import operations

REPORT = {"totals": {}, "modules": [{"name": "a", "shape": [2, 3]}, {"name": "b", "shape": [4, 5]}]}
WEBHOOK = {"url": "https://1.1.1.1/"}


def test_every_operation_has_a_call(client: Any, served: Served, tmp_path: Path) -> None:
    body = served.server.body()
    done, _ = publish(served.server, tmp_path)
    assert [file["name"] for file in client.artifacts(done)["files"]][1] == "config.json"
    client.download(done, "config.json", tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == b"{}"
    assert client.report(done) == {}
    client.delete(done)

    assert client.plan(body)["plan"]["source"] == "tiny"
    assert client.estimate(body)["disk"]["bytes"] > 0
    assert list(client.jobs()) == []
    job = client.submit(body)
    assert client.job(job["id"])["attempts"] == []
    assert [event["type"] for event in client.events(job["id"])] == ["job_queued"]
    assert client.cancel(job["id"])["status"] == "cancelled"
    assert client.retry(job["id"])["status"] == "queued"
    clone = client.clone(job["id"], {"scheme": "W8A16"})
    assert (clone["scheme"], clone["calibration"]) == ("W8A16", job["calibration"])

    batch = client.submit_batch({"jobs": [body]}, name="one")
    assert client.batch(batch["id"])["name"] == "one"
    assert [each["id"] for each in client.batches()] == [batch["id"]]
    assert client.cancel_batch(batch["id"])["counts"]["cancelled"] == 1

    webhook = client.create_webhook(WEBHOOK)
    assert webhook["secret"].startswith("whsec_")
    assert client.webhook(webhook["id"])["url"] == WEBHOOK["url"]
    assert [each["id"] for each in client.webhooks()] == [webhook["id"]]
    sent = client.ping_webhook(webhook["id"])
    assert [each["id"] for each in client.deliveries(webhook["id"])] == [sent["id"]]
    assert client.redeliver(webhook["id"], sent["id"])["id"] == sent["id"]
    client.delete_webhook(webhook["id"])

    assert client.project()["name"] == "default"
    key = client.create_key("reading", ["read"])
    assert [each["name"] for each in client.api_keys()] == ["reading", "first key"]
    client.revoke_key(key["id"])
    assert client.workers()["items"] == []
    assert [queue["device_class"] for queue in client.queues()["items"]] == ["any", "cpu", "cuda"]
    assert "gptq" in [method["name"] for method in client.methods()["items"]]
    assert "W4A16" in [scheme["name"] for scheme in client.schemes()["items"]]
    assert "c4" in [dataset["name"] for dataset in client.datasets()["named"]]
    assert client.alive() == {"status": "alive"}
    assert client.ready()["status"] == "ready"

    assert served.asked == {(method, path) for method, path, _ in operations(served.server)}


def test_lists_go_on_over_pages(client: Any, served: Served) -> None:
    ids = [served.server.submit(labels={"team": "a"} if number else {})["id"] for number in range(5)]
    assert [job["id"] for job in client.jobs(page_size=2)] == ids[::-1]
    assert [job["id"] for job in client.jobs(sort="created_at", page_size=2)] == ids
    assert [job["id"] for job in client.jobs(labels={"team": "a"})] == ids[:0:-1]
    assert list(client.jobs(created_before=datetime.now(UTC) - timedelta(days=1))) == []
    assert next(iter(client.jobs(page_size=1)))["id"] == ids[-1]
    batch = client.submit_batch({"jobs": [{"model": "nowhere"}] * 5})
    assert [item["index"] for item in client.batch_items(batch["id"], page_size=2)] == list(range(5))


def test_events_and_the_report(client: Any, served: Served) -> None:
    job_id = served.server.submit()["id"]
    lease = start(served.server)
    for phase in ("fetch", "plan", "compress"):
        with served.server.database.write() as session:
            leases.set_phase(session, lease, phase)
    with served.server.database.write() as session:
        leases.fail(session, lease, AttemptOutcome.FAILED, "x", "X", retryable=False, report=REPORT)
    seqs = [event["seq"] for event in client.events(job_id, page_size=2)]
    assert seqs == list(range(1, 8))
    assert [event["seq"] for event in client.events(job_id, since=5)] == [6, 7]
    assert client.report(job_id) == REPORT
    rows = list(csv.DictReader(client.report_csv(job_id).splitlines()))
    assert [row["rows"] for row in rows] == ["2", "4"]


def test_following_ends_with_the_job(client: Any, served: Served) -> None:
    job_id = served.server.submit()["id"]
    seen = []
    for event in client.follow(job_id):
        seen.append(event)
        if len(seen) == 1:
            client.cancel(job_id)
    assert [event["type"] for event in seen][-1] == "job_cancelled"
    assert seen == list(client.events(job_id))
    assert list(client.follow(job_id)) == seen
    assert list(client.follow(job_id, since=seen[-1]["seq"])) == []
    with pytest.raises(ApiError, match="job_not_found"):
        list(client.follow("job_x"))


def test_following_a_job_that_was_retried(client: Any, served: Served) -> None:
    """The event that ended it the first time is not the end."""
    job_id = served.server.submit()["id"]
    for call in (client.cancel, client.retry, client.cancel):
        call(job_id)
    types = [event["type"] for event in client.follow(job_id)]
    assert types.count("job_cancelled") == 2


def test_waiting(client: Any, served: Served) -> None:
    job_id = served.server.submit()["id"]
    with pytest.raises(TimeoutError, match="still queued after 0 seconds"):
        client.wait(job_id, timeout_seconds=0)
    canceller = threading.Timer(0.2, served.server.http.post, (f"/v1/jobs/{job_id}/cancel",))
    canceller.start()
    began = time.monotonic()
    assert client.wait(job_id)["status"] == "cancelled"
    assert time.monotonic() - began < 10  # a long poll is answered when something happens
    canceller.join()
    assert client.wait(job_id, timeout_seconds=0)["status"] == "cancelled"


def test_a_batch_of_lines_and_its_dry_run(client: Any, served: Served) -> None:
    lines = f"{json.dumps(served.server.body())}\nnot json\n".encode()
    planned = client.plan_batch(lines)
    assert (planned["accepted"], planned["refused"]) == (1, 1)
    assert list(client.batches()) == []
    assert client.submit_batch(lines)["counts"]["accepted"] == 1


def test_an_idempotency_key_of_ones_own(client: Any, served: Served) -> None:
    body = served.server.body()
    first, again, other = (client.submit(body, idempotency_key=key)["id"] for key in ("a", "a", None))
    assert first == again != other
    cloned, same = (client.clone(first, {"name": "x"}, idempotency_key="c")["id"] for _ in range(2))
    assert cloned == same


def test_errors_say_what_is_wrong(client: Any) -> None:
    with pytest.raises(ApiError) as caught:
        client.submit({"model": "/etc", "scheme": "W9"})
    error = caught.value
    assert (error.status, error.code) == (422, "unknown_scheme")
    assert "W4A16" in error.hint
    assert {each["pointer"] for each in error.errors} == {"/scheme", "/model"}
    assert len(error.request_id) == 16
    assert str(error).startswith("unknown_scheme: There is no scheme named 'W9'. Use one of")


def test_a_wrong_key_and_none(connect: Connect, served: Served) -> None:
    with connect(served.url, "wrong") as client, pytest.raises(ApiError, match="wrong_key"):
        list(client.jobs())
    with connect(served.url) as client:
        assert client.ready()["status"] == "ready"
        with pytest.raises(ApiError, match="missing_key"):
            client.project()


def test_keys_that_expire(client: Any, served: Served, connect: Connect) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    made = client.create_key("reading", ["read"], expires_at=tomorrow)
    assert datetime.fromisoformat(made["expires_at"]) == tomorrow
    with connect(served.url, made["key"]) as reader:
        assert list(reader.jobs()) == []
        client.revoke_key(made["id"])
        with pytest.raises(ApiError, match="wrong_key"):
            list(reader.jobs())


def test_awaited_calls_run_beside_each_other(served: Served) -> None:
    """Each waits for a job of its own; one after the other they would wait for the first alone."""
    jobs = [served.server.submit()["id"] for _ in range(5)]

    async def wait_for_all() -> list[str]:
        async with AsyncClient(served.url, served.key) as client:
            waiting = [asyncio.create_task(client.wait(job_id)) for job_id in jobs]
            for job_id in reversed(jobs):
                await client.cancel(job_id)
            return [job["status"] for job in await asyncio.gather(*waiting)]

    assert asyncio.run(wait_for_all()) == ["cancelled"] * 5
