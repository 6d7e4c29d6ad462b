"""The result cache: what was made once is given again, and what is being made is waited for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from api import database as clock
from api.jobs.ledger.models import FileDigest, Job
from api.jobs.queue import deduplication, leases
from api.jobs.queue.leases import Lease
from api.jobs.submission import cache_keys, digests
from api.security import Scope
from api.store.factory import open_store
from compression.checkpoint.headers import read_checkpoint
from compression.recipe import DatasetSpec
from tests.api.conftest import Server
from tests.api.jobs.leasing import WORKER, event_types, job_row, reap, start
from tests.api.test_security import new_server_key
from worker.housekeeping import remove_deleted

REPORT = {"totals": {"source_bytes": 2, "output_bytes": 1}, "modules": []}


def know_files(server: Server) -> None:
    """As after a worker has read all files once."""
    files = cache_keys.files_of(read_checkpoint(server.model), DatasetSpec(path=str(server.dataset)))
    read = {cache_keys.stamp(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()}
    with server.database.write() as session:
        digests.remember(session, read)


@pytest.fixture
def known(server: Server) -> Server:
    """A server that knows the digests of its model and dataset."""
    know_files(server)
    return server


def finish(server: Server, lease: Lease) -> None:
    """The lease's job publishes one file and succeeds."""
    store = open_store(server.settings.store_url)
    folder = f"artifacts/{lease.job_id}/{lease.token}"
    manifest = {"job": lease.job_id, "files": [{"name": "a.txt", "size": 1, "sha256": "0" * 64}]}
    for name, text in (("a.txt", "a"), ("manifest.json", json.dumps(manifest))):
        file = server.settings.data_dir / name
        file.write_text(text)
        store.put(f"{folder}/{name}", file)
        file.unlink()
    with server.database.write() as session:
        leases.succeed(session, lease, REPORT, f"{folder}/manifest.json")


def run(server: Server, **more: Any) -> str:
    """A job that has succeeded."""
    job_id: str = server.submit(**more)["id"]
    lease = start(server)
    assert lease.job_id == job_id
    finish(server, lease)
    return job_id


def read(server: Server, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = server.http.get(f"/v1/jobs/{job_id}").json()
    return job


class TestWhatWasMade:
    def test_is_there_at_once(self, known: Server) -> None:
        first = run(known)
        second = known.submit(name="again", labels={"a": "b"}, priority=3)
        assert second["id"] != first
        assert (second["status"], second["deduplicated_from"]) == ("succeeded", first)
        assert second["layers_done"] == second["layers_total"]
        assert (second["name"], second["finished_at"] is not None) == ("again", True)
        assert event_types(known.database, second["id"])[-1] == "job_succeeded"
        assert read(known, second["id"])["attempts"] == []
        assert known.http.get(f"/v1/jobs/{second['id']}/report").json() == REPORT

    def test_has_the_same_files(self, known: Server) -> None:
        run(known)
        second = known.submit()["id"]
        listed = known.http.get(f"/v1/jobs/{second}/artifacts").json()
        assert listed["job"] == second
        assert [file["name"] for file in listed["files"]] == ["a.txt"]
        assert known.http.get(listed["files"][0]["url"]).text == "a"

    def test_stays_until_the_last_is_deleted(self, known: Server) -> None:
        first, second, third = run(known), known.submit()["id"], known.submit()["id"]
        store = open_store(known.settings.store_url)

        def delete(job_id: str) -> bool:
            assert known.http.delete(f"/v1/jobs/{job_id}").status_code == 204
            remove_deleted(known.database, store)
            return any(store.list("artifacts"))

        assert delete(first)
        assert known.http.get(f"/v1/jobs/{second}/artifacts/a.txt").text == "a"
        assert delete(third)
        assert known.submit()["deduplicated_from"] == second
        assert delete(second)
        assert known.submit()["status"] == "succeeded"
        for job in known.http.get("/v1/jobs").json()["items"]:
            left = delete(job["id"])
        assert not left
        with known.database.read() as session:
            assert session.scalars(select(Job)).all() == []

    def test_is_made_again_on_demand(self, known: Server) -> None:
        first = run(known)
        again = known.submit(cache="bypass")
        assert (again["status"], again["deduplicated_from"]) == ("queued", None)
        finish(known, start(known))
        assert known.submit()["deduplicated_from"] == again["id"] != first

    def test_of_a_batch_is_taken_item_by_item(self, known: Server) -> None:
        first = run(known)
        other = known.body(scheme="W8A8")
        answer = known.http.post("/v1/batches", json={"jobs": [known.body(), other, other]}).json()
        jobs = [read(known, item["job_id"]) for item in answer["items"]]
        assert [job["status"] for job in jobs] == ["succeeded", "queued", "queued"]
        assert [job["deduplicated_from"] for job in jobs] == [first, None, jobs[1]["id"]]
        assert answer["counts"]["succeeded"] == 1

    def test_is_not_known_while_a_file_is_not(self, server: Server) -> None:
        run(server)
        assert server.submit()["status"] == "queued"

    def test_failed_or_gone_is_not_taken(self, known: Server) -> None:
        first = run(known)
        known.http.delete(f"/v1/jobs/{first}")
        job = known.submit()
        assert job["deduplicated_from"] is None
        known.http.post(f"/v1/jobs/{job['id']}/cancel")
        assert known.submit()["deduplicated_from"] is None


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


CHANGES: dict[str, Callable[[Server], dict[str, Any]]] = {
    "weights": lambda server: rewrite(next(server.model.glob("*.safetensors"))) or {},
    "config": lambda server: rewrite(server.model / "config.json") or {},
    "tokenizer": lambda server: rewrite(server.model / "tokenizer.json") or {},
    "card": lambda server: rewrite(server.model / "README.md") or {},
    "dataset": lambda server: rewrite(server.dataset) or {},
    "name of the model": lambda server: {"model": str(server.model.rename(server.model.with_name("b")))},
    "recipe": lambda _: {"group_size": 32},
    "column": lambda server: {"dataset": {"path": str(server.dataset), "text_column": "text"}},
    "calibration": lambda _: {"calibration": {"num_calibration_samples": 5, "max_seq_length": 64}},
    "evaluation": lambda _: {"evaluation": {"enabled": False}},
    "quality gate": lambda _: {"quality_gate": {"max_perplexity_ratio": 2.0}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_differs_is_other_work(server: Server, change: Callable[[Server], dict[str, Any]]) -> None:
    (server.model / "README.md").write_text("# A card\n")
    know_files(server)
    first = run(server)
    weights = next(server.model.glob("*.safetensors"))
    content = weights.read_bytes()
    more = change(server)
    if weights.exists() and weights.read_bytes() != content:  # the same shape, other numbers
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert server.submit(**more)["deduplicated_from"] is None
    if server.model.exists():
        know_files(server)
        assert server.submit(**more)["deduplicated_from"] != first


def test_another_spelling_is_the_same_work(known: Server) -> None:
    first = run(known)
    step = {"type": "GPTQModifier", "scheme": "W4A16", "targets": "Linear", "ignore": ["lm_head"]}
    recipe = {"steps": [step]}
    assert known.submit(scheme=None, recipe=recipe)["deduplicated_from"] == first


def test_projects_share_nothing(known: Server) -> None:
    run(known)
    other = new_server_key(known, "other", Scope.ADMIN)
    job = known.http.post("/v1/jobs", json=known.body(), headers=other).json()
    assert (job["status"], job["deduplicated_from"]) == ("queued", None)


class TestWhatIsBeingMade:
    def test_is_waited_for(self, known: Server) -> None:
        first = known.submit()["id"]
        lease = start(known)
        second = known.submit()
        assert (second["status"], second["deduplicated_from"]) == ("queued", first)
        obstacle = read(known, second["id"])["obstacle"]
        assert (obstacle["code"], first in obstacle["message"]) == ("attached", True)
        with known.database.write() as session:
            assert leases.claim(session, WORKER, 90) is None
            assert leases.queued_by_device(session) == {}
        finish(known, lease)
        ended = read(known, second["id"])
        assert (ended["status"], ended["deduplicated_from"], ended["obstacle"]) == ("succeeded", first, None)

    @pytest.mark.parametrize("end", ["cancelled", "failed"])
    def test_that_ends_badly_sets_the_others_free(self, known: Server, end: str) -> None:
        first = known.submit()["id"]
        lease = start(known)
        second, third = known.submit()["id"], known.submit()["id"]
        with known.database.write() as session:
            if end == "failed":
                leases.fail(session, lease, leases.AttemptOutcome.FAILED, "some_code", "why", retryable=False)
            else:
                session.execute(update(Job).where(Job.id == first).values(status="cancelling"))
                leases.mark_cancelled(session, lease)
        assert reap(known.database) == 2
        assert read(known, second)["deduplicated_from"] is None
        assert event_types(known.database, second)[-1] == "job_queued"
        assert start(known).job_id == second
        assert reap(known.database) == 0
        assert read(known, third)["status"] == "queued"

    def test_that_waits_itself_is_waited_for_if_it_is_ahead(self, known: Server) -> None:
        first = known.submit(priority=1)["id"]
        assert known.submit(priority=1)["deduplicated_from"] == first
        assert known.submit()["deduplicated_from"] == first
        assert known.submit(priority=2)["deduplicated_from"] is None
        assert known.submit(resources={"device_class": "cpu"})["deduplicated_from"] is None
        assert known.submit(cache="bypass")["deduplicated_from"] is None

    def test_by_a_worker_is_no_wait_for_one(self, known: Server) -> None:
        first = known.submit()["id"]
        second = known.submit(max_queue_seconds=60)["id"]
        lease = start(known)
        with known.database.write() as session:
            past = clock.now(session) - timedelta(seconds=1)
            session.execute(update(Job).where(Job.id == second).values(queue_deadline=past))
        assert reap(known.database) == 0
        with known.database.write() as session:
            leases.release(session, lease)
        assert reap(known.database) == 1
        expired = read(known, second)
        assert (expired["status"], expired["deduplicated_from"]) == ("expired", None)
        assert read(known, first)["status"] == "queued"

    def test_can_be_left(self, known: Server) -> None:
        known.submit()
        second = known.submit()["id"]
        known.http.post(f"/v1/jobs/{second}/cancel")
        assert read(known, second)["status"] == "cancelled"
        retried = known.http.post(f"/v1/jobs/{second}/retry").json()
        assert (retried["status"], retried["deduplicated_from"]) == ("queued", None)

    def test_of_two_that_come_at_once_one_waits(self, known: Server) -> None:
        with ThreadPoolExecutor(8) as pool:
            jobs = list(pool.map(lambda _: known.submit(), range(8)))
        (first,) = [job["id"] for job in jobs if job["deduplicated_from"] is None]
        assert {job["deduplicated_from"] for job in jobs} == {None, first}


def take(server: Server, lease: Lease, key: str | None) -> bool:
    """What a worker does once it knows which work its job is."""
    with server.database.write() as session:
        deduplication.lock_project(session, job_row(server.database, lease.job_id).project_id)
        leases.save_cache_key(session, lease, key)
        return key is not None and deduplication.end_as_duplicate(session, lease.job_id, lease.attempt)


class TestWhatAWorkerFindsOut:
    """The digests were not known when the jobs were submitted."""

    def test_it_was_made(self, server: Server) -> None:
        server.submit()
        lease = start(server)
        assert not take(server, lease, "k")
        finish(server, lease)
        second = server.submit()["id"]
        other = start(server)
        assert take(server, other, "k")
        job = read(server, second)
        assert (job["status"], job["deduplicated_from"]) == ("succeeded", lease.job_id)
        assert [attempt["outcome"] for attempt in job["attempts"]] == ["deduplicated"]
        with server.database.write() as session, pytest.raises(leases.LeaseLost):
            leases.renew(session, other, 90)

    def test_another_worker_makes_it(self, server: Server) -> None:
        first, second, third = (server.submit()["id"] for _ in range(3))
        one, two, three = (start(server) for _ in range(3))
        assert not take(server, two, "k")
        assert take(server, one, "k")
        assert not take(server, three, "other")
        assert read(server, first)["deduplicated_from"] == second
        assert read(server, first)["status"] == "queued"
        finish(server, two)
        assert read(server, first)["status"] == "succeeded"
        assert read(server, third)["status"] == "running"

    def test_those_that_wait_for_one_that_waits_succeed_with_it(self, known: Server) -> None:
        first = known.submit(cache="bypass")["id"]
        second = known.submit(priority=2)["id"]
        third = known.submit(priority=1)["id"]
        assert read(known, third)["deduplicated_from"] == second
        two, one = start(known), start(known)
        key = job_row(known.database, first).cache_key
        assert (two.job_id, one.job_id) == (second, first)
        assert not take(known, one, "other")
        with known.database.write() as session:
            leases.save_cache_key(session, one, key)
        assert take(known, two, key)
        finish(known, one)
        assert [read(known, job)["deduplicated_from"] for job in (second, third)] == [first, second]
        assert {read(known, job)["status"] for job in (second, third)} == {"succeeded"}

    def test_the_work_is_another_than_it_was(self, known: Server) -> None:
        known.submit()
        second = known.submit()["id"]
        lease = start(known)
        assert not take(known, lease, "changed")
        assert read(known, second)["deduplicated_from"] is None
        assert start(known).job_id == second


def test_old_digests_are_forgotten(known: Server) -> None:
    run(known)
    with known.database.write() as session:
        old = clock.now(session) - timedelta(days=digests.REMEMBERED_DAYS + 1)
        session.execute(update(FileDigest).values(at=old))
        digests.forget_old(session, 100)
    assert known.submit()["deduplicated_from"] is None
