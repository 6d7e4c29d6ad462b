"""Reading, cancelling and retrying jobs over HTTP."""

from __future__ import annotations

import base64
import csv
import io
import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from api.database import now
from api.jobs.ledger.models import AttemptOutcome, StoredPlan
from api.jobs.queue import leases
from api.jobs.queue.workers import Worker
from api.jobs.schemas import JobDetail
from compression.recipe import Calibration, Evaluation, Recipe
from tests.api.conftest import Server
from tests.api.jobs.leasing import start


def get(server: Server, path: str, **params: Any) -> dict[str, Any]:
    answer = server.http.get(path, params=params)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


class TestList:
    def test_pages_the_newest_first_without_gaps_or_repeats(self, server: Server) -> None:
        made = [server.submit(name=str(number))["id"] for number in range(7)]
        seen: list[str] = []
        cursor: dict[str, str] = {}
        sizes = []
        while True:
            page = get(server, "/v1/jobs", limit=3, **cursor)
            seen += [job["id"] for job in page["items"]]
            sizes.append(len(page["items"]))
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert seen == made[::-1]
        assert sizes == [3, 3, 1]

    def test_a_job_that_comes_meanwhile_does_not_move_the_next_page(self, server: Server) -> None:
        made = [server.submit()["id"] for _ in range(4)]
        first = get(server, "/v1/jobs", limit=2)
        server.submit()
        second = get(server, "/v1/jobs", limit=2, cursor=first["next_cursor"])
        assert [job["id"] for job in second["items"]] == made[1::-1]
        assert second["next_cursor"] is None

    def test_filters(self, server: Server) -> None:
        gptq = server.submit()["id"]
        other = server.submit(scheme="W8A8")["id"]
        server.http.post(f"/v1/jobs/{gptq}/cancel")

        def ids(**params: str) -> list[str]:
            return [job["id"] for job in get(server, "/v1/jobs", **params)["items"]]

        assert ids(status="cancelled") == [gptq]
        assert ids(scheme="W8A8") == [other]
        assert ids(model=str(server.model)) == [other, gptq]
        assert ids(model="/other") == []
        assert ids(status="queued", scheme="W4A16") == []
        assert ids(method="gptq") == [other, gptq]
        assert ids(method="rtn") == []

    def test_labels(self, server: Server) -> None:
        search = server.submit(labels={"team": "search", 'a"b': "x:y"})["id"]
        ads = server.submit(labels={"team": "ads"})["id"]
        server.submit()

        def ids(*labels: str) -> list[str]:
            answer = server.http.get("/v1/jobs", params={"label": labels})
            return [job["id"] for job in answer.json()["items"]]

        assert ids("team:search") == [search]
        assert ids("team:ads") == [ads]
        assert ids("team:search", 'a"b:x:y') == [search]
        assert ids("team:search", "team:ads") == []
        assert ids("team:") == ids("x':1") == []
        assert server.http.get("/v1/jobs", params={"label": "team"}).status_code == 422

    def test_a_label_that_could_not_be_found_is_refused(self, server: Server) -> None:
        for body in (server.body(labels={"a:b": "c"}), server.body(labels={"good": "x", "tab\t": "c"})):
            answer = server.http.post("/v1/jobs", json=body)
            said = answer.json()
            assert (answer.status_code, said["code"]) == (422, "label_key_invalid")
            assert "no colon" in said["errors"][0]["message"]
            assert said["errors"][0]["pointer"].startswith("/labels/")
        batch = server.http.post("/v1/batches", json={"labels": {"a:b": "c"}, "jobs": [server.body()]})
        assert (batch.status_code, batch.json()["code"]) == (422, "label_key_invalid")
        items = {"jobs": [server.body(labels={"a:b": "c"}), server.body()]}
        refused, accepted = server.http.post("/v1/batches", json=items).json()["items"]
        assert refused["error"]["code"] == "label_key_invalid"
        assert "job_id" in accepted

    def test_oldest_first_and_between_two_times(self, server: Server) -> None:
        made = [server.submit() for _ in range(5)]
        ids = [job["id"] for job in made]
        first = get(server, "/v1/jobs", sort="created_at", limit=2)
        second = get(server, "/v1/jobs", sort="created_at", limit=3, cursor=first["next_cursor"])
        assert [job["id"] for job in (*first["items"], *second["items"])] == ids
        assert second["next_cursor"] is None
        between = get(
            server, "/v1/jobs", created_after=made[0]["created_at"], created_before=made[3]["created_at"]
        )
        assert [job["id"] for job in between["items"]] == ids[2:0:-1]
        answer = server.http.get("/v1/jobs", params={"created_after": "2026-01-01T00:00:00"})
        assert answer.status_code == 422  # whose midnight?

    @pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
    def test_times_that_no_clock_shows_are_refused(self, server: Server, moment: str) -> None:
        for name in ("created_after", "created_before"):
            assert server.http.get("/v1/jobs", params={name: moment}).status_code == 422
        cursor = base64.urlsafe_b64encode(f"{moment} job".encode()).decode()
        answer = server.http.get("/v1/jobs", params={"cursor": cursor})
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_cursor")

    @pytest.mark.parametrize(
        "cursor",
        ["x", "!!!!", base64.urlsafe_b64encode(b"2026-01-01T00:00:00 job_1").decode(), "é", "AA==", "a b"],
    )
    def test_cursors_that_are_not_ours(self, server: Server, cursor: str) -> None:
        answer = server.http.get("/v1/jobs", params={"cursor": cursor})
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_cursor")


class TestProgress:
    def test_a_job_from_start_to_end(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        entry = {"file": "a", "sha256": "a" * 64, "size": 1}
        with server.database.write() as session:
            leases.set_phase(session, lease, "compress")
            leases.save_plan(session, lease, {"work_key": "w", "fingerprint": "f"})
            solved = {"layer": 0, "layers_total": 2, "relative_error": 0.5, "seconds": 1.0, "eta_seconds": 1}
            leases.record_layer(session, lease, {**solved, "entry": entry}, "work/a")
        running = get(server, f"/v1/jobs/{job_id}")
        assert (running["status"], running["phase"], running["layers_done"]) == ("running", "compress", 1)
        assert running["attempts"][0]["worker_id"] == "worker-1"
        assert running["attempts"][0]["outcome"] is None
        assert server.http.get(f"/v1/jobs/{job_id}/report").json()["code"] == "report_not_available"
        (worker,) = get(server, "/v1/workers")["items"]
        assert (worker["busy"], worker["job_id"]) == (True, job_id)
        with server.database.write() as session:
            session.execute(update(Worker).values(heartbeat_at=now(session) - timedelta(minutes=5)))
        assert get(server, "/v1/workers")["items"] == []

        report = {"schema_version": 1, "totals": {"seconds": 2.0}}
        with server.database.write() as session:
            leases.succeed(session, lease, report, "artifacts/x/1/manifest.json")
        done = get(server, f"/v1/jobs/{job_id}")
        assert (done["status"], done["phase"], done["error"]) == ("succeeded", None, None)
        assert datetime.fromisoformat(done["finished_at"]) >= datetime.fromisoformat(done["started_at"])
        assert get(server, f"/v1/jobs/{job_id}/report") == report

    def test_a_report_as_a_table(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        row = {"name": 'a,"b"', "shape": [8, 4], "relative_error": None, "weight_error": 0.5}
        report = {"schema_version": 1, "modules": [row, {**row, "name": "c", "tokens": 7}]}
        with server.database.write() as session:
            leases.succeed(session, lease, report, "artifacts/x/1/manifest.json")
        answer = server.http.get(f"/v1/jobs/{job_id}/report", params={"format": "csv"})
        assert answer.headers["Content-Type"].startswith("text/csv")
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{job_id}.csv"'
        assert list(csv.DictReader(io.StringIO(answer.text))) == [
            {
                "name": 'a,"b"',
                "rows": "8",
                "columns": "4",
                "relative_error": "",
                "weight_error": "0.5",
                "tokens": "",
            },
            {
                "name": "c",
                "rows": "8",
                "columns": "4",
                "relative_error": "",
                "weight_error": "0.5",
                "tokens": "7",
            },
        ]
        assert server.http.get(f"/v1/jobs/{job_id}/report", params={"format": "xml"}).status_code == 422

    def test_events_in_pages(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        with server.database.write() as session:
            for number in range(5):
                leases.append_event(session, lease, "warning", {"number": number})
        path = f"/v1/jobs/{job_id}/events"
        everything = get(server, path)
        total = len(everything["items"])
        assert [event["seq"] for event in everything["items"]] == list(range(1, total + 1))
        page = get(server, path, since=2, limit=3)
        assert [event["seq"] for event in page["items"]] == [3, 4, 5]
        assert (page["next_since"], page["status"]) == (5, "running")
        last = get(server, path, since=total)
        assert (last["items"], last["next_since"]) == ([], total)

    def test_a_job_is_shown_as_documented(self, server: Server) -> None:
        job_id = server.submit(labels={"a": "ä"})["id"]
        start(server)
        shown = get(server, f"/v1/jobs/{job_id}")
        assert shown == JobDetail.model_validate(shown).model_dump(mode="json")
        listed = get(server, "/v1/jobs")["items"][0]
        assert listed == {name: shown[name] for name in listed}
        for name, kind in (("recipe", Recipe), ("calibration", Calibration), ("evaluation", Evaluation)):
            assert shown[name] == kind.model_validate(shown[name]).model_dump(mode="json")
        with server.database.read() as session:
            assert shown["plan"] == json.loads(session.scalars(select(StoredPlan.document)).one())

    def test_a_failure_says_why(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        with server.database.write() as session:
            outcome = AttemptOutcome.FAILED
            leases.fail(session, lease, outcome, "nan_weights", "NaN in q_proj", retryable=False)
        job = get(server, f"/v1/jobs/{job_id}")
        assert job["error"] == {"code": "nan_weights", "message": "NaN in q_proj"}
        assert job["attempts"][0]["outcome"] == "failed"


class TestCancelAndRetry:
    def test_a_waiting_job(self, server: Server) -> None:
        job_id = server.submit()["id"]
        cancelled = server.http.post(f"/v1/jobs/{job_id}/cancel")
        assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
        assert server.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        retried = server.http.post(f"/v1/jobs/{job_id}/retry").json()
        assert (retried["status"], retried["id"], retried["finished_at"]) == ("queued", job_id, None)
        types = [event["type"] for event in get(server, f"/v1/jobs/{job_id}/events")["items"]]
        assert [type for type in types if type != "warning"] == [
            "job_queued",
            "cancel_requested",
            "job_cancelled",
            "job_queued",
        ]

    def test_a_running_job(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        assert server.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
        assert server.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
        answer = server.http.post(f"/v1/jobs/{job_id}/retry")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_retryable")
        with server.database.write() as session:
            leases.mark_cancelled(session, lease)
        assert get(server, f"/v1/jobs/{job_id}")["status"] == "cancelled"
        events = get(server, f"/v1/jobs/{job_id}/events")["items"]
        assert sum(event["type"] == "cancel_requested" for event in events) == 1

    def test_a_succeeded_job(self, server: Server) -> None:
        job_id = server.submit()["id"]
        lease = start(server)
        with server.database.write() as session:
            leases.succeed(session, lease, {}, "artifacts/x/1/manifest.json")
        for action, code in (("cancel", "not_cancellable"), ("retry", "not_retryable")):
            answer = server.http.post(f"/v1/jobs/{job_id}/{action}")
            assert (answer.status_code, answer.json()["code"]) == (409, code)

    def test_unknown_jobs(self, server: Server) -> None:
        for method, path in [
            ("GET", "/v1/jobs/job_1"),
            ("GET", "/v1/jobs/job_1/events"),
            ("GET", "/v1/jobs/job_1/report"),
            ("POST", "/v1/jobs/job_1/cancel"),
            ("POST", "/v1/jobs/job_1/retry"),
        ]:
            answer = server.http.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")


def test_queues(server: Server) -> None:
    first = server.submit()
    server.submit(resources={"device_class": "cuda"})
    start(server)
    second = server.submit()

    def queues() -> dict[str, dict[str, Any]]:
        return {each.pop("device_class"): each for each in get(server, "/v1/queues")["items"]}

    nothing = {"queued": 0, "running": 0, "oldest_queued_at": None, "workers": 0, "idle_workers": 0}
    found = queues()
    assert found["any"] == {**nothing, "queued": 1, "oldest_queued_at": second["created_at"], "workers": 1}
    assert found["cpu"] == {**nothing, "running": 1, "workers": 1}
    assert (found["cuda"]["queued"], found["cuda"]["workers"]) == (1, 0)
    server.http.post(f"/v1/jobs/{first['id']}/cancel")
    assert queues()["cpu"]["running"] == 1  # until its worker lets go
    with server.database.write() as session:
        session.execute(update(Worker).values(job_id=None))
    assert queues()["cpu"]["idle_workers"] == 1


def test_ids_sort_by_time(server: Server) -> None:
    ids = [server.submit()["id"] for _ in range(3)]
    assert ids == sorted(ids)
    assert all(id.startswith("job_") and len(id) == 30 for id in ids)


def test_answers_hold_no_secret_and_no_lease(server: Server) -> None:
    job = get(server, f"/v1/jobs/{server.submit()['id']}")
    assert not {"lease_token", "lease_owner", "source", "manifest_key", "project_id"} & set(job)
    assert "resolved_plan" not in json.dumps(job)
