"""POST /v1/batches: what becomes of each item, and what is no batch at all."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from structlog.testing import capture_logs

from api.batches import service
from api.batches.schemas import BatchSubmit
from api.jobs.ledger.models import Batch, Job
from api.jobs.queue import workers
from api.jobs.queue.workers import WorkerIdentity
from api.projects.service import authenticate
from api.security import KeyHasher
from api.settings import Settings
from tests.api.conftest import Server
from tests.api.jobs.leasing import event_types

JSON_LINES = {"Content-Type": "application/jsonl"}


def submit(server: Server, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Submit a batch that is accepted, and return it."""
    answer = server.http.post("/v1/batches", json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    batch: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/batches/{batch['id']}"
    return batch


def refused(server: Server, body: Any, status: int = 422) -> dict[str, Any]:
    """Submit what is no batch, and return the problem; nothing was stored."""
    answer = server.http.post("/v1/batches", json=body)
    assert answer.status_code == status, answer.text
    assert server.http.get("/v1/batches").json()["items"] == []
    assert server.http.get("/v1/jobs").json()["items"] == []
    problem: dict[str, Any] = answer.json()
    return problem


def counts(**more: int) -> dict[str, int]:
    names = ("total", "accepted", "refused", "queued", "running", "cancelling", "succeeded", "failed")
    return {**dict.fromkeys((*names, "cancelled", "expired", "deleted"), 0), **more}


class TestJobs:
    def test_each_item_is_accepted_or_refused_on_its_own(self, server: Server) -> None:
        items = [
            server.body(name="first"),
            server.body(scheme="W5A16"),
            {"scheme": "W4A16", "calibration": {"max_seq_length": 1}},
            "no object",
            server.body(scheme="FP8_DYNAMIC", method=None),
        ]
        batch = submit(server, {"name": "all kinds", "labels": {"team": "a"}, "jobs": items})
        assert (batch["name"], batch["labels"], batch["next_cursor"]) == ("all kinds", {"team": "a"}, None)
        assert batch["counts"] == counts(total=5, accepted=2, refused=3, queued=2)
        first, scheme, fields, no_object, last = batch["items"]
        assert [item["index"] for item in batch["items"]] == [0, 1, 2, 3, 4]
        assert [set(first), set(scheme)] == [{"index", "job_id"}, {"index", "error"}]
        assert scheme["error"]["code"] == "unknown_scheme"
        assert "W4A16" in scheme["error"]["hint"]
        assert [error["pointer"] for error in scheme["error"]["errors"]] == ["/scheme"]
        assert fields["error"]["code"] == "validation_error"
        pointers = {error["pointer"] for error in fields["error"]["errors"]}
        assert pointers == {"/model", "/calibration/max_seq_length"}
        assert no_object["error"]["code"] == "not_a_json_object"
        job = server.http.get(f"/v1/jobs/{last['job_id']}").json()
        assert (job["scheme"], job["method"]) == ("FP8_DYNAMIC", "rtn")
        assert job["batch"] == {"id": batch["id"], "index": 4}

    def test_a_job_of_a_batch_is_the_same_as_one_that_is_submitted_alone(self, server: Server) -> None:
        body = server.body(name="a", labels={"x": "y"}, group_size=64, max_queue_seconds=60)
        alone = server.submit(**body)
        (item,) = submit(server, {"jobs": [body]})["items"]
        of_batch = server.http.get(f"/v1/jobs/{item['job_id']}").json()
        alone = server.http.get(f"/v1/jobs/{alone['id']}").json()
        own = {"id", "created_at", "batch"}
        assert {k: v for k, v in of_batch.items() if k not in own} == {
            k: v for k, v in alone.items() if k not in own
        }
        assert alone["batch"] is None
        assert event_types(server.database, of_batch["id"]) == event_types(server.database, alone["id"])
        first = server.http.get(f"/v1/jobs/{of_batch['id']}/events").json()["items"][0]
        assert first["data"]["batch"] == of_batch["batch"]["id"]
        with server.database.read() as session:
            one, other = (session.get_one(Job, each["id"]) for each in (alone, of_batch))
            for name in ("source", "dataset", "plan_id", "required_host_bytes", "required_gpu_bytes"):
                assert getattr(one, name) == getattr(other, name), name
            assert one.queue_deadline is not None
            assert other.queue_deadline is not None
            waits = other.queue_deadline - other.created_at
            assert waits == one.queue_deadline - one.created_at

    def test_jobs_go_in_the_order_of_the_batch(self, server: Server) -> None:
        items = submit(server, {"jobs": [server.body(priority=0)] * 20})["items"]
        listed = server.http.get("/v1/jobs", params={"limit": 20}).json()["items"]
        assert [job["batch"]["index"] for job in listed] == list(range(20))[::-1]
        assert sorted(item["job_id"] for item in items) == [item["job_id"] for item in items]

    def test_all_refused_is_a_batch_that_says_why(self, server: Server) -> None:
        batch = submit(server, {"jobs": [server.body(model="/nowhere")] * 2})
        assert batch["counts"] == counts(total=2, refused=2)
        assert {item["error"]["code"] for item in batch["items"]} == {"path_not_allowed"}
        assert server.http.get(f"/v1/batches/{batch['id']}").json() == batch

    def test_what_an_item_says_in_short_form_is_pointed_at_there(self, server: Server) -> None:
        short = server.body(group_size=48)
        steps = [{"type": "rtn", "scheme": "W4A16", "group_size": 48}]
        whole = {"model": str(server.model), "recipe": {"steps": steps}}
        items = submit(server, {"jobs": [short, whole]})["items"]
        pointers = [[error["pointer"] for error in item["error"]["errors"]] for item in items]
        assert pointers == [["/group_size"], ["/recipe/steps/0/group_size"]]

    def test_keys_that_are_no_text_refuse_the_item_alone(self, server: Server) -> None:
        keys = ("\ud800", "\0", "\ud800\0")
        body = json.dumps({"jobs": [*({**server.body(), key: 1} for key in keys), server.body()]})
        headers = {"Content-Type": "application/json"}
        answer = server.http.post("/v1/batches", content=body, headers=headers)
        assert answer.status_code == 202, answer.text
        assert answer.json()["counts"]["refused"] == 3


class TestSweep:
    def test_every_model_with_every_scheme(self, server: Server) -> None:
        other = Path(shutil.copytree(server.model, server.model.parent / "other"))
        base = {name: value for name, value in server.body().items() if name not in ("model", "scheme")}
        sweep = {
            "models": [str(server.model), str(other)],
            "schemes": ["FP8_DYNAMIC", {"scheme": "W4A16", "method": "rtn"}, {"scheme": "W9A9"}],
            "base": {**base, "method": "rtn", "priority": 3},
        }
        batch = submit(server, {"sweep": sweep})
        assert batch["counts"] == counts(total=6, accepted=4, refused=2, queued=4)
        found = [
            server.http.get(f"/v1/jobs/{item['job_id']}").json() if "job_id" in item else None
            for item in batch["items"]
        ]
        assert [job and (job["model"], job["scheme"]) for job in found] == [
            (str(server.model), "FP8_DYNAMIC"),
            (str(server.model), "W4A16"),
            None,
            (str(other), "FP8_DYNAMIC"),
            (str(other), "W4A16"),
            None,
        ]
        assert {job["priority"] for job in found if job} == {3}

    @pytest.mark.parametrize("name", ["model", "scheme"])
    def test_what_the_sweep_gives_is_not_in_its_base(self, server: Server, name: str) -> None:
        sweep = {"models": [str(server.model)], "schemes": ["W8A8"], "base": {name: "x"}}
        problem = refused(server, {"sweep": sweep})
        assert problem["code"] == "sweep_base_overlaps"
        assert problem["errors"][0]["pointer"] == f"/sweep/base/{name}"

    def test_a_scheme_has_the_fields_of_the_short_form_alone(self, server: Server) -> None:
        sweep = {"models": [str(server.model)], "schemes": [{"scheme": "W8A8", "model": "/etc"}]}
        problem = refused(server, {"sweep": sweep})
        assert problem["code"] == "validation_error"
        assert "/sweep/schemes/0/model" in [error["pointer"] for error in problem["errors"]]


class TestJSONLines:
    @pytest.mark.parametrize("kind", ["application/jsonl", "application/x-ndjson; charset=utf-8"])
    def test_a_job_on_each_line(self, server: Server, kind: str) -> None:
        lines = [json.dumps(server.body()), "", "{'no': json}", "  ", json.dumps(server.body(scheme="W8A8"))]
        answer = server.http.post(
            "/v1/batches",
            content="\r\n".join(lines),
            params={"name": "lines"},
            headers={"Content-Type": kind},
        )
        assert answer.status_code == 202, answer.text
        batch = answer.json()
        assert batch["name"] == "lines"
        assert batch["counts"] == counts(total=3, accepted=2, refused=1, queued=2)
        assert batch["items"][1]["error"]["code"] == "invalid_json"

    @pytest.mark.parametrize(
        ("content", "code"),
        [(b"", "batch_empty"), (b"\n \n", "batch_empty"), (b"{}\n" * 1001, "batch_too_large")],
    )
    def test_too_few_and_too_many(self, server: Server, content: bytes, code: str) -> None:
        answer = server.http.post("/v1/batches", content=content, headers=JSON_LINES)
        assert (answer.status_code, answer.json()["code"]) == (422, code)

    def test_other_kinds_of_text_are_not_read_as_lines(self, server: Server) -> None:
        content = json.dumps({"jobs": [server.body()]})
        answer = server.http.post("/v1/batches", content=content, headers={"Content-Type": "text/plain"})
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (415, "unsupported_media_type")
        assert "application/jsonl" in problem["hint"]


class TestNoBatch:
    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({}, "jobs_or_sweep"),
            ({"jobs": [{}], "sweep": {"models": ["/m"], "schemes": ["W8A8"]}}, "jobs_or_sweep"),
            ({"jobs": []}, "batch_empty"),
            ({"jobs": [{}] * 1001}, "batch_too_large"),
            ({"sweep": {"models": ["/m"], "schemes": []}}, "batch_empty"),
            ({"sweep": {"models": ["/m"] * 11, "schemes": ["W8A8"] * 91}}, "batch_too_large"),
            ({"sweep": {"models": ["/m"]}}, "validation_error"),
            ({"jobs": {"model": "/m"}}, "validation_error"),
            ({"jobs": [{}], "priority": 1}, "validation_error"),
            ({"jobs": [{}], "name": "x\n"}, "validation_error"),
            ([{}], "not_a_json_object"),
        ],
    )
    def test_what_cannot_be_read_as_one(self, server: Server, body: Any, code: str) -> None:
        problem = refused(server, body)
        assert problem["code"] == code
        assert problem["hint"] or problem["errors"]

    def test_no_json(self, server: Server) -> None:
        headers = {"Content-Type": "application/json"}
        answer = server.http.post("/v1/batches", content=b'{"jobs', headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")

    def test_a_hub_that_does_not_answer(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        jobs = [server.body(), server.body(model="someone/tiny")]
        assert refused(server, {"jobs": jobs}, status=503)["code"] == "hub_unreachable"


class TestDryRun:
    def test_it_tells_what_would_be_and_stores_nothing(self, server: Server) -> None:
        body = {"jobs": [server.body(), server.body(scheme="W5A16")]}
        answer = server.http.post(
            "/v1/batches", params={"dry_run": True}, json=body, headers={"Idempotency-Key": "k"}
        )
        assert answer.status_code == 200, answer.text
        planned = answer.json()
        assert (planned["total"], planned["accepted"], planned["refused"]) == (2, 1, 1)
        assert planned["items"][0] == {
            "index": 0,
            "model": str(server.model),
            "scheme": "W4A16",
            "method": "gptq",
            "layers_total": 2,
            "device_class": "any",
        }
        assert planned["items"][1]["error"]["code"] == "unknown_scheme"
        assert server.http.get("/v1/batches").json()["items"] == []
        assert server.http.get("/v1/jobs").json()["items"] == []


class TestIdempotency:
    def test_the_same_key_and_body_give_the_same_batch(self, server: Server) -> None:
        jobs = [server.body(), server.body(scheme="W5A16")]
        first = submit(server, {"jobs": jobs}, **{"Idempotency-Key": "night"})
        shutil.rmtree(server.model)  # a repeated request is answered although it would now be refused
        spelled_otherwise = {"jobs": [{**jobs[0], "priority": 0}, jobs[1]], "name": None}
        assert submit(server, spelled_otherwise, **{"Idempotency-Key": "night"}) == first

    @pytest.mark.parametrize("change", [{"name": "b"}, {"labels": {"a": "b"}}, {"jobs": 2}])
    def test_another_body_is_refused(self, server: Server, change: dict[str, Any]) -> None:
        body = {"jobs": [server.body()]}
        submit(server, body, **{"Idempotency-Key": "night"})
        if "jobs" in change:
            change = {"jobs": [server.body(), server.body()]}
        headers = {"Idempotency-Key": "night"}
        answer = server.http.post("/v1/batches", json=body | change, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")

    def test_a_sweep_asks_for_the_same_as_its_jobs(self, server: Server) -> None:
        headers = {"Idempotency-Key": "k"}
        base = server.body()
        model, scheme = base.pop("model"), base.pop("scheme")
        swept = submit(server, {"sweep": {"models": [model], "schemes": [scheme], "base": base}}, **headers)
        assert submit(server, {"jobs": [server.body()]}, **headers) == swept

    def test_a_key_of_a_job_is_another(self, server: Server) -> None:
        headers = {"Idempotency-Key": "k"}
        server.http.post("/v1/jobs", json=server.body(), headers=headers)
        assert submit(server, {"jobs": [server.body()]}, **headers)["counts"]["accepted"] == 1

    def test_a_race_makes_one_batch(self, server: Server) -> None:
        def race(_: int) -> str:
            return str(submit(server, {"jobs": [server.body()] * 3}, **{"Idempotency-Key": "k"})["id"])

        with ThreadPoolExecutor(8) as pool, capture_logs() as records:
            assert len(set(pool.map(race, range(8)))) == 1
        assert [record["event"] for record in records].count("batch_accepted") == 1
        with server.database.read() as session:
            assert session.scalar(select(func.count()).select_from(Batch)) == 1
            assert session.scalar(select(func.count()).select_from(Job)) == 3


def test_workers_are_woken_for_the_jobs_that_wait(server: Server) -> None:
    """Not for those that were refused, for want of room too."""
    settings = server.settings.model_copy(update={"max_queued": 3})
    key = server.http.headers["Authorization"].removeprefix("Bearer ")
    with server.database.write() as session:
        for number in range(9):
            workers.heartbeat(session, WorkerIdentity(f"w{number}", "cpu", 1 << 40, 0), None)
    with server.database.look() as session:
        caller = authenticate(session, KeyHasher.from_settings(settings), settings, key)
    jobs = [
        server.body(),
        server.body(scheme="none"),
        *(server.body(cache="bypass", resources={"device_class": "cpu"}) for _ in range(3)),
    ]
    body = BatchSubmit.model_validate({"jobs": jobs})
    made = service.submit(server.database, settings, caller, body, None)
    assert (made.batch.counts.accepted, made.wake_ups) == (3, {"any": 1, "cpu": 2})


def test_a_thousand_jobs_fit_into_the_default_body(server: Server) -> None:
    """As detailed as one can be without texts of one's own: 16 KB a job are allowed."""
    job = server.body(
        method="gptq",
        ignore=["lm_head", *(f"model.layers.{layer}.mlp.down_proj" for layer in range(100))],
        labels={f"label-{number}": "x" * 100 for number in range(32)},
    )
    size = len(json.dumps({"jobs": [job] * 1000}))
    assert size < Settings.model_fields["max_body_bytes"].default
