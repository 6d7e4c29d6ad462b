"""A job like another, and one that is gone."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select

from api.jobs.ledger import repository
from api.jobs.ledger.models import Job, JobEvent, StoredPlan
from api.jobs.queue import leases, retention
from tests.api.conftest import Server
from tests.api.jobs.leasing import start
from tests.support.jobs import new_job


def clone(server: Server, job_id: str, **overrides: Any) -> dict[str, Any]:
    answer = server.http.post(f"/v1/jobs/{job_id}/clone", json=overrides)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    return job


OWN = {"id", "created_at", "event_seq"}


def without(job: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name not in {*OWN, *names}}


class TestClone:
    def test_without_changes_it_is_the_same_submission(self, server: Server) -> None:
        said = {
            "method": "gptq",
            "group_size": 32,
            "observer": "mse",
            "calibration": {"num_calibration_samples": 3, "max_seq_length": 32, "seed": 5},
            "evaluation": {"num_samples": 2},
            "quality_gate": {"max_perplexity_ratio": 1.5},
            "require": "vllm",
            "priority": 7,
            "name": "a name",
            "labels": {"team": "search"},
            "max_runtime_seconds": 60,
            "max_queue_seconds": 61,
            "resources": {"device_class": "cpu"},
        }
        job = server.submit(**said)
        same = clone(server, job["id"])
        assert same["id"] != job["id"]
        assert without(same) == without(job)
        first = server.http.get(f"/v1/jobs/{same['id']}/events").json()["items"][0]
        assert first["data"] == {"device_class": "cpu", "clone_of": job["id"]}
        with server.database.read() as session:
            one, other = (session.get_one(Job, each["id"]) for each in (job, same))
            for name in ("source", "dataset", "require", "plan_id"):
                assert getattr(one, name) == getattr(other, name), name

    def test_what_is_given_takes_the_place(self, server: Server) -> None:
        job = server.submit(labels={"team": "search"}, priority=3)
        other = clone(server, job["id"], labels={"team": "ads"}, calibration={"num_calibration_samples": 2})
        assert (other["labels"], other["priority"]) == ({"team": "ads"}, 3)
        assert other["calibration"]["num_calibration_samples"] == 2
        assert other["calibration"]["max_seq_length"] == 2048  # a field is replaced whole
        assert other["recipe"] == job["recipe"]
        assert clone(server, job["id"], scheme="W8A8", method="rtn")["method"] == "rtn"
        sparse = clone(server, job["id"], recipe={"steps": [{"type": "magnitude"}]}, dataset=None)
        assert (sparse["scheme"], sparse["dataset"]) == ("SPARSE_50", None)

    def test_a_clone_of_a_job_of_inline_texts_has_them(self, server: Server) -> None:
        texts = ["a text that is long enough " * 40] * 8
        job = server.submit(dataset={"texts": texts})
        assert clone(server, job["id"], priority=1)["dataset"] == "8 inline texts"

    @pytest.mark.parametrize(
        ("overrides", "code"),
        [
            ({"scheme": "W5A16"}, "unknown_scheme"),
            ({"group_size": 32}, "scheme_missing"),
            ({"model": ""}, "validation_error"),
            ({"mode": "x"}, "validation_error"),
            (
                {"recipe": {"steps": [{"type": "rtn", "scheme": "W8A8"}]}, "scheme": "W8A8"},
                "recipe_and_scheme",
            ),
        ],
    )
    def test_changes_that_cannot_be(self, server: Server, overrides: dict[str, Any], code: str) -> None:
        job = server.submit()
        answer = server.http.post(f"/v1/jobs/{job['id']}/clone", json=overrides)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert len(server.http.get("/v1/jobs").json()["items"]) == 1

    def test_a_key_makes_one(self, server: Server) -> None:
        job = server.submit()
        key = {"Idempotency-Key": "k"}
        path = f"/v1/jobs/{job['id']}/clone"
        once, twice = (server.http.post(path, json={"priority": 2}, headers=key).json() for _ in range(2))
        assert once == twice
        assert server.http.post(path, json={"priority": 3}, headers=key).status_code == 422

    def test_of_nothing(self, server: Server) -> None:
        answer = server.http.post("/v1/jobs/job_1/clone", json={})
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


class TestDelete:
    def test_a_deleted_job_is_gone_for_everybody(self, server: Server) -> None:
        job_id, other = server.submit()["id"], server.submit()["id"]
        path = f"/v1/jobs/{job_id}"
        server.http.post(f"{path}/cancel")
        answer = server.http.delete(path)
        assert (answer.status_code, answer.content) == (204, b"")
        for method, what in (
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/report"),
            ("GET", "/artifacts"),
            ("GET", "/artifacts/config.json"),
            ("POST", "/cancel"),
            ("POST", "/retry"),
            ("DELETE", ""),
        ):
            gone = server.http.request(method, path + what)
            assert (gone.status_code, gone.json()["code"]) == (404, "job_not_found"), what
        assert server.http.post(f"{path}/clone", json={}).status_code == 404
        assert [job["id"] for job in server.http.get("/v1/jobs").json()["items"]] == [other]

    def test_one_that_goes_on_is_kept(self, server: Server) -> None:
        queued = server.submit()["id"]
        answer = server.http.delete(f"/v1/jobs/{queued}")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_deletable")
        start(server)
        assert server.http.delete(f"/v1/jobs/{queued}").status_code == 409
        server.http.post(f"/v1/jobs/{queued}/cancel")
        assert server.http.delete(f"/v1/jobs/{queued}").status_code == 409  # cancelling
        assert server.http.get(f"/v1/jobs/{queued}").json()["status"] == "cancelling"

    def test_its_key_makes_another(self, server: Server) -> None:
        body, key = server.body(), {"Idempotency-Key": "k"}
        first = server.http.post("/v1/jobs", json=body, headers=key).json()["id"]
        server.http.post(f"/v1/jobs/{first}/cancel")
        server.http.delete(f"/v1/jobs/{first}")
        second = server.http.post("/v1/jobs", json=body, headers=key)
        assert second.status_code == 202
        assert second.json()["id"] != first

    def test_a_stream_of_it_ends(self, server: Server) -> None:
        job_id = server.submit()["id"]
        with ThreadPoolExecutor() as pool:
            stream = pool.submit(
                server.http.get, f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}
            )
            time.sleep(0.5)
            with server.database.write() as session:
                job = session.get_one(Job, job_id)
                job.deleted_at = job.created_at
            assert stream.result(10).status_code == 200

    def test_its_plan_goes_with_the_last_job_that_has_it(self, server: Server) -> None:
        calibrations = [{**server.body()["calibration"], "seed": seed} for seed in range(2)]
        alike = [server.submit(calibration=calibration)["id"] for calibration in calibrations]
        other = server.submit(scheme="W8A16")["id"]
        for job_id, left in ((alike[0], 2), (other, 1), (alike[1], 0)):
            server.http.post(f"/v1/jobs/{job_id}/cancel")
            server.http.delete(f"/v1/jobs/{job_id}")
            with server.database.write() as session:
                retention.remove(session, job_id)
                assert session.scalar(select(func.count()).select_from(StoredPlan)) == left

    def test_a_plan_that_a_new_job_takes_meanwhile_stays(self, server: Server) -> None:
        job_id = server.submit()["id"]
        server.http.post(f"/v1/jobs/{job_id}/cancel")
        server.http.delete(f"/v1/jobs/{job_id}")
        with server.database.read() as session:
            kept = {plan.id: plan.document for plan in session.scalars(select(StoredPlan))}

        def remove() -> None:
            with server.database.write() as session:
                retention.remove(session, job_id)

        with ThreadPoolExecutor() as pool:
            with server.database.write() as session:
                repository.keep_plans(session, kept)
                removing = pool.submit(remove)
                time.sleep(0.5)
                assert not removing.done()
                job = session.get_one(Job, job_id)
                new = new_job("new", job.created_at, project_id=job.project_id, plan_id=job.plan_id)
                session.add(new)
            removing.result(10)
        assert server.http.get("/v1/jobs/new").json()["plan"] == json.loads(next(iter(kept.values())))

    def test_only_what_was_deleted_is_removed(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        with server.database.write() as session:
            leases.succeed(session, lease, {"modules": []}, "artifacts/x/1/manifest.json")
            retention.remove(session, job_id)
        server.http.delete(f"/v1/jobs/{job_id}")
        with server.database.write() as session:
            assert retention.deleted(session, 10) == [job_id]
            retention.remove(session, job_id)
        with server.database.read() as session:
            assert session.get(Job, job_id) is None
            assert session.query(JobEvent).count() == 0


def test_a_clone_of_another_versions_job_says_what_is_no_longer_taken(server: Server) -> None:
    job_id = server.submit()["id"]
    with server.database.write() as session:
        session.get_one(Job, job_id).recipe = {"steps": [{"method": "of yesterday"}]}
    answer = server.http.post(f"/v1/jobs/{job_id}/clone", json={})
    assert (answer.status_code, answer.json()["code"]) == (422, "validation_error")
    assert answer.json()["errors"][0]["pointer"].startswith("/recipe/steps/0")
    assert "another version" in answer.json()["errors"][0]["hint"]
    assert server.http.post(f"/v1/jobs/{job_id}/clone", json={"scheme": "W8A8"}).status_code == 202
