"""Following a job: validators, requests that wait, streams of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.http.following import KEEP_ALIVE_SECONDS
from api.jobs.ledger import events
from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue import leases
from api.jobs.watch import JobWatch
from tests.api.conftest import Server
from tests.api.jobs.leasing import start
from tests.support.serving import serving


def tell(server: Server, job_id: str, number: int) -> None:
    with server.database.write() as session:
        events.append(session, job_id, "warning", {"number": number})


class TestETag:
    def test_nothing_is_sent_again_that_has_not_changed(self, server: Server) -> None:
        job_id = server.submit()["id"]
        path = f"/v1/jobs/{job_id}"
        first = server.http.get(path)
        again = server.http.get(path, headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["ETag"] == first.headers["ETag"]
        several = {"If-None-Match": f'"x", {first.headers["ETag"]}'}
        assert server.http.get(path, headers=several).status_code == 304
        lease = start(server)
        changed = server.http.get(path, headers={"If-None-Match": first.headers["ETag"]})
        assert (changed.status_code, changed.json()["status"]) == (200, "running")
        with server.database.write() as session:
            leases.set_phase(session, lease, "compress")
        later = server.http.get(path, headers={"If-None-Match": changed.headers["ETag"]})
        assert (later.status_code, later.json()["phase"]) == (200, "compress")

    def test_another_projects_job_has_none(self, server: Server) -> None:
        answer = server.http.get("/v1/jobs/job_1", headers={"If-None-Match": '*, W/"1-0"'})
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


class TestLongPoll:
    def test_it_answers_when_something_happens(self, server: Server) -> None:
        job = server.submit()
        path, params = f"/v1/jobs/{job['id']}", {"wait": 30, "since": job["event_seq"]}
        with ThreadPoolExecutor() as pool:
            began = time.monotonic()
            waiting = pool.submit(server.http.get, path, params=params)
            time.sleep(0.5)
            assert not waiting.done()
            start(server)
            answer = waiting.result(10).json()
        assert answer["status"] == "running"
        assert answer["event_seq"] > job["event_seq"]
        assert time.monotonic() - began < 5

    def test_it_answers_at_once_what_is_news_already(self, server: Server) -> None:
        job = server.submit()
        began = time.monotonic()
        params = {"wait": 30, "since": job["event_seq"] - 1}
        assert server.http.get(f"/v1/jobs/{job['id']}", params=params).status_code == 200
        assert time.monotonic() - began < 5

    def test_it_answers_when_time_is_over(self, server: Server) -> None:
        job = server.submit()
        began = time.monotonic()
        params = {"wait": 1, "since": job["event_seq"]}
        assert server.http.get(f"/v1/jobs/{job['id']}", params=params).json()["status"] == "queued"
        assert 0.9 < time.monotonic() - began < 5

    def test_nobody_waits_for_what_has_ended_or_is_not_there(self, server: Server) -> None:
        job_id = server.submit()["id"]
        server.http.post(f"/v1/jobs/{job_id}/cancel")
        began = time.monotonic()
        params = {"wait": 30, "since": 2**31 - 1}
        assert server.http.get(f"/v1/jobs/{job_id}", params=params).json()["status"] == "cancelled"
        assert server.http.get("/v1/jobs/job_1", params=params).status_code == 404
        assert time.monotonic() - began < 5


def read_stream(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


STREAM = {"Accept": "text/event-stream"}


class TestStream:
    def test_it_ends_with_the_job(self, server: Server) -> None:
        job_id = server.submit()["id"]
        path = f"/v1/jobs/{job_id}/events"
        with ThreadPoolExecutor() as pool:
            stream = pool.submit(server.http.get, path, headers=STREAM)
            lease = start(server)
            for number in range(250):  # more than a page
                tell(server, job_id, number)
            time.sleep(0.5)
            assert not stream.done()
            with server.database.write() as session:
                leases.fail(session, lease, AttemptOutcome.FAILED, "nan", "NaN", retryable=False)
            answer = stream.result(20)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-store"
        page = server.http.get(path, params={"limit": 1000}).json()["items"]
        told = read_stream(answer.text)
        assert [json.loads(event["data"]) for event in told] == page
        assert [int(event["id"]) for event in told] == list(range(1, len(page) + 1))
        assert [event["event"] for event in told] == [event["type"] for event in page]
        assert told[-1]["event"] == "job_failed"

    def test_it_goes_on_where_it_broke(self, server: Server) -> None:
        job_id = server.submit()["id"]
        for number in range(5):
            tell(server, job_id, number)
        server.http.post(f"/v1/jobs/{job_id}/cancel")
        path = f"/v1/jobs/{job_id}/events"
        page = server.http.get(path).json()["items"]
        answer = server.http.get(path, headers={**STREAM, "Last-Event-ID": "3"}, params={"since": 1})
        assert [json.loads(event["data"]) for event in read_stream(answer.text)] == page[3:]
        since = server.http.get(path, headers=STREAM, params={"since": 3})
        assert since.text == answer.text
        over = server.http.get(path, headers={**STREAM, "Last-Event-ID": str(page[-1]["seq"])})
        assert (over.status_code, over.content) == (204, b"")

    def test_what_is_wrong_is_said_before_it_begins(self, server: Server) -> None:
        answer = server.http.get("/v1/jobs/job_1/events", headers=STREAM)
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
        job_id = server.submit()["id"]
        bad = server.http.get(f"/v1/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": "x"})
        assert bad.status_code == 422

    def test_it_says_that_it_is_there(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        assert KEEP_ALIVE_SECONDS < 60
        monkeypatch.setattr("api.http.following.KEEP_ALIVE_SECONDS", 0.2)
        job_id = server.submit()["id"]
        with ThreadPoolExecutor() as pool:
            stream = pool.submit(server.http.get, f"/v1/jobs/{job_id}/events", headers=STREAM)
            time.sleep(1)
            server.http.post(f"/v1/jobs/{job_id}/cancel")
            assert ": still here\n\n" in stream.result(10).text


def test_a_hundred_streams_take_no_thread_each(server: Server) -> None:
    """If each took one, only as many as the pool has would begin, 40, and nothing would end them."""
    job_id = server.submit()["id"]
    key = server.http.headers["Authorization"]

    async def watch(client: httpx.AsyncClient, begun: asyncio.Semaphore) -> str:
        async with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                begun.release()
            return "\n".join(lines)

    async def watch_all(url: str) -> list[str]:
        limits = httpx.Limits(max_connections=100)
        headers = {"Authorization": key}
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60) as client:
            begun = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(watch(client, begun)) for _ in range(100)]
            for _ in range(100):
                await begun.acquire()
            with ThreadPoolExecutor(1) as pool:
                await asyncio.wrap_future(pool.submit(server.http.post, f"/v1/jobs/{job_id}/cancel"))
            return await asyncio.gather(*tasks)

    app = server.http.app
    assert isinstance(app, FastAPI)
    with serving(app, lifespan="off") as url:
        told = asyncio.run(watch_all(url))
    assert len(set(told)) == 1
    assert "event: job_cancelled" in told[0]


def test_one_query_serves_all_and_none_is_made_for_nobody() -> None:
    asked: list[list[str]] = []
    answers = {"a": 3, "b": 7}

    def read(job_ids: Sequence[str]) -> dict[str, int]:
        asked.append(sorted(job_ids))
        return dict(answers)

    async def scenario() -> list[bool]:
        watch = JobWatch(read, poll_seconds=0.01)
        waiting = [watch.changed("a", 3, 5), watch.changed("a", 4, 0.1), watch.changed("b", 7, 5)]
        tasks = [asyncio.create_task(each) for each in waiting]
        await asyncio.sleep(0.05)
        answers["a"] = 4
        await asyncio.sleep(0.05)
        del answers["b"]  # deleted
        found = await asyncio.gather(*tasks)
        await asyncio.sleep(0.05)
        so_far = len(asked)
        await asyncio.sleep(0.05)
        assert len(asked) == so_far
        return [*found, await watch.changed("a", 0, 5)]

    assert asyncio.run(scenario()) == [True, False, True, True]
    assert asked[0] == ["a", "b"]
    assert asked[-1] == ["a"]


def test_who_comes_during_a_query_is_not_taken_for_gone() -> None:
    def read(job_ids: Sequence[str]) -> dict[str, int]:
        time.sleep(0.1)
        return dict.fromkeys(job_ids, 1)

    async def scenario() -> bool:
        watch = JobWatch(read, poll_seconds=0.01)
        first = asyncio.create_task(watch.changed("a", 1, 1))
        await asyncio.sleep(0.05)
        late = await watch.changed("b", 1, 0.5)
        return late or await first

    assert not asyncio.run(scenario())
