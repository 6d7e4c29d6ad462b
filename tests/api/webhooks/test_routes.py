"""Webhooks over HTTP: made, listed, pinged, deleted; their log; and the callbacks of jobs."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from api import database as clock
from api.security import Scope
from api.settings import Settings
from api.webhooks.models import Webhook
from tests.api.conftest import Server
from tests.api.test_errors import assert_problem
from tests.api.test_security import new_server_key

PUBLIC = "https://93.184.216.34/hook"
"""An address, so that no resolver is asked."""


@dataclass(frozen=True)
class Hook:
    """A webhook of the server's first project."""

    server: Server
    id: str

    @property
    def path(self) -> str:
        return f"/v1/webhooks/{self.id}"

    def deliveries(self, **params: Any) -> dict[str, Any]:
        answer = self.server.http.get(f"{self.path}/deliveries", params=params)
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page

    def ping(self) -> dict[str, Any]:
        answer = self.server.http.post(f"{self.path}/ping")
        assert answer.status_code == 202, answer.text
        delivery: dict[str, Any] = answer.json()
        return delivery

    def disable(self) -> None:
        with self.server.database.write() as session:
            session.get_one(Webhook, self.id).disabled_at = clock.now(session)


def create(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/webhooks", json={"url": PUBLIC, **fields})
    assert answer.status_code == 201, answer.text
    webhook: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/webhooks/{webhook['id']}"
    return webhook


@pytest.fixture
def hook(server: Server) -> Hook:
    return Hook(server, create(server)["id"])


class TestWebhooks:
    def test_the_secret_is_shown_once(self, server: Server) -> None:
        made = create(server, description="for the dashboard", events=["job_failed", "job_failed"])
        secret = made.pop("secret")
        assert secret.startswith("whsec_")
        assert made["events"] == ["job_failed"]
        assert (made["all_jobs"], made["disabled_at"]) == (True, None)
        assert server.http.get(f"/v1/webhooks/{made['id']}").json() == made
        assert server.http.get("/v1/webhooks").json() == {"items": [made], "next_cursor": None}

    def test_by_default_endings_are_told(self, server: Server) -> None:
        endings = ["job_succeeded", "job_failed", "job_cancelled", "job_expired"]
        assert create(server)["events"] == endings

    def test_pages(self, server: Server) -> None:
        made = [create(server)["id"] for _ in range(3)]
        first = server.http.get("/v1/webhooks", params={"limit": 2}).json()
        second = server.http.get("/v1/webhooks", params={"cursor": first["next_cursor"]}).json()
        assert [each["id"] for each in first["items"] + second["items"]] == made[::-1]
        assert second["next_cursor"] is None
        assert_problem(server.http.get("/v1/webhooks", params={"cursor": "x"}), 422, "bad_cursor")

    def test_a_deleted_one_is_gone_with_its_log(self, server: Server, hook: Hook) -> None:
        delivery = hook.ping()["id"]
        answer = server.http.delete(hook.path)
        assert (answer.status_code, answer.content) == (204, b"")
        for method, path in (
            ("GET", ""),
            ("GET", "/deliveries"),
            ("POST", "/ping"),
            ("POST", f"/deliveries/{delivery}/redeliver"),
            ("DELETE", ""),
        ):
            gone = server.http.request(method, hook.path + path)
            assert_problem(gone, 404, "webhook_not_found")

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("http://93.184.216.34/", "webhook_url_not_allowed"),
            ("https://127.0.0.1/", "webhook_url_not_allowed"),
            ("https://2130706433/", "webhook_url_not_allowed"),
            ("https://user:hush@93.184.216.34/", "webhook_url_not_allowed"),
            ("nonsense", "webhook_url_not_allowed"),
            ("https://a..b/", "webhook_host_not_found"),
        ],
    )
    def test_unsafe_urls(self, server: Server, url: str, code: str) -> None:
        answer = server.http.post("/v1/webhooks", json={"url": url})
        problem = assert_problem(answer, 422, code)
        assert [(error["code"], error["pointer"]) for error in problem["errors"]] == [(code, "/url")]
        assert problem["hint"]
        assert "hush" not in answer.text
        assert server.http.get("/v1/webhooks").json()["items"] == []

    @pytest.mark.parametrize(
        ("fields", "pointer"),
        [
            ({"events": ["layer_solved"]}, "/events/0"),
            ({"events": []}, "/events"),
            ({"secret": "whsec_own"}, "/secret"),
            ({"description": "a\nb"}, "/description"),
        ],
    )
    def test_bad_fields(self, server: Server, fields: dict[str, Any], pointer: str) -> None:
        answer = server.http.post("/v1/webhooks", json={"url": PUBLIC, **fields})
        problem = assert_problem(answer, 422, "validation_error")
        assert pointer in [error["pointer"] for error in problem["errors"]]

    def test_scopes(self, server: Server, hook: Hook) -> None:
        read = new_server_key(server, "default", Scope.READ)
        submit = new_server_key(server, "default", Scope.SUBMIT)
        delivery = hook.ping()["id"]
        for key, method, path, status in (
            (submit, "POST", "/v1/webhooks", 403),
            (submit, "DELETE", hook.path, 403),
            (read, "POST", f"{hook.path}/ping", 403),
            (read, "POST", f"{hook.path}/deliveries/{delivery}/redeliver", 403),
            (submit, "POST", f"{hook.path}/ping", 202),
            (submit, "POST", f"{hook.path}/deliveries/{delivery}/redeliver", 202),
            (read, "GET", hook.path, 200),
            (read, "GET", f"{hook.path}/deliveries", 200),
        ):
            body = {"url": PUBLIC} if path == "/v1/webhooks" else None
            assert server.http.request(method, path, headers=key, json=body).status_code == status, path

    def test_other_projects_webhooks_do_not_exist(self, server: Server, hook: Hook) -> None:
        other = new_server_key(server, "other", Scope.ADMIN)
        delivery = hook.ping()["id"]
        for method, path in (
            ("GET", ""),
            ("GET", "/deliveries"),
            ("POST", "/ping"),
            ("POST", f"/deliveries/{delivery}/redeliver"),
            ("DELETE", ""),
        ):
            answer = server.http.request(method, hook.path + path, headers=other)
            assert_problem(answer, 404, "webhook_not_found")
        assert server.http.get("/v1/webhooks", headers=other).json()["items"] == []
        body = server.body(callback=hook.id)
        refused = server.http.post("/v1/jobs", json=body, headers=other)
        assert_problem(refused, 422, "callback_not_found")


class TestDeliveries:
    def test_the_log(self, server: Server, hook: Hook) -> None:
        job = server.submit()["id"]
        server.http.post(f"/v1/jobs/{job}/cancel")
        ping = hook.ping()
        assert (ping["event"], ping["job_id"], ping["status"], ping["attempts"]) == (
            "ping",
            None,
            "pending",
            0,
        )
        first = hook.deliveries(limit=1)
        second = hook.deliveries(limit=1, cursor=first["next_cursor"])
        assert first["items"] == [ping]
        assert second["next_cursor"] is None
        (told,) = second["items"]
        assert (told["event"], told["job_id"], told["last_error"]) == ("job_cancelled", job, None)
        assert hook.deliveries(job_id=job)["items"] == [told]
        assert hook.deliveries(status="delivered")["items"] == []
        assert len(hook.deliveries(status="pending")["items"]) == 2

    def test_redelivery_is_the_same_message_with_all_attempts_anew(self, server: Server, hook: Hook) -> None:
        ping = hook.ping()
        path = f"{hook.path}/deliveries/{ping['id']}/redeliver"
        answer = server.http.post(path)
        assert answer.status_code == 202
        again = answer.json()
        assert (again["id"], again["status"], again["attempts"]) == (ping["id"], "pending", 0)
        assert again["next_attempt_at"] >= ping["next_attempt_at"]
        missing = server.http.post(f"{hook.path}/deliveries/msg_1/redeliver")
        assert_problem(missing, 404, "delivery_not_found")
        other = Hook(server, create(server)["id"])
        assert_problem(
            server.http.post(f"{other.path}/deliveries/{ping['id']}/redeliver"), 404, "delivery_not_found"
        )

    def test_a_disabled_webhook_gets_nothing(self, server: Server, hook: Hook) -> None:
        ping = hook.ping()
        hook.disable()
        for path in ("/ping", f"/deliveries/{ping['id']}/redeliver"):
            assert_problem(server.http.post(hook.path + path), 409, "webhook_disabled")
        answer = server.http.post("/v1/jobs", json=server.body(callback=hook.id))
        assert_problem(answer, 422, "webhook_disabled")
        assert server.http.get(hook.path).json()["disabled_at"]


class TestCallbacks:
    def test_a_job_calls_back_and_its_clone_too(self, server: Server) -> None:
        hook = Hook(server, create(server, all_jobs=False)["id"])
        job = server.submit(callback=hook.id)
        silent = server.submit()
        assert (job["callback"], silent["callback"]) == (hook.id, None)
        clone = server.http.post(f"/v1/jobs/{job['id']}/clone", json={}).json()
        assert clone["callback"] == hook.id
        for each in (silent, job, clone):
            server.http.post(f"/v1/jobs/{each['id']}/cancel")
        assert [each["job_id"] for each in hook.deliveries()["items"]] == [clone["id"], job["id"]]

    def test_a_batch_tells_of_its_jobs(self, server: Server) -> None:
        hook = Hook(server, create(server, all_jobs=False)["id"])
        every = Hook(server, create(server, all_jobs=True, events=["job_queued", "job_cancelled"])["id"])
        jobs = [server.body(callback=hook.id), server.body(), server.body(callback="wh_1")]
        batch = server.http.post("/v1/batches", json={"jobs": jobs}).json()
        told, silent = (item["job_id"] for item in batch["items"][:2])
        assert batch["items"][2]["error"]["code"] == "callback_not_found"
        server.http.post(f"/v1/batches/{batch['id']}/cancel")
        assert [each["job_id"] for each in hook.deliveries()["items"]] == [told]
        found = {(each["event"], each["job_id"]) for each in every.deliveries()["items"]}
        assert found == {(event, job) for event in ("job_queued", "job_cancelled") for job in (told, silent)}

    def test_a_callback_that_is_not_there(self, server: Server) -> None:
        for params in ({}, {"dry_run": True}):
            answer = server.http.post("/v1/jobs", json=server.body(callback="wh_1"), params=params)
            problem = assert_problem(answer, 422, "callback_not_found")
            assert problem["errors"][0]["pointer"] == "/callback"
        assert server.http.get("/v1/jobs").json()["items"] == []

    def test_a_clone_of_a_job_whose_webhook_is_gone_says_so(self, server: Server, hook: Hook) -> None:
        job = server.submit(callback=hook.id)["id"]
        server.http.delete(hook.path)
        answer = server.http.post(f"/v1/jobs/{job}/clone", json={})
        assert "callback" in assert_problem(answer, 422, "callback_not_found")["hint"]
        other = server.http.post(f"/v1/jobs/{job}/clone", json={"callback": None})
        assert (other.status_code, other.json()["callback"]) == (202, None)

    def test_secrets_are_in_no_answer(self, server: Server) -> None:
        made = create(server)
        job = server.submit(callback=made["id"])["id"]
        server.http.post(f"/v1/jobs/{job}/cancel")
        paths = ("/v1/webhooks", f"/v1/webhooks/{made['id']}", f"/v1/webhooks/{made['id']}/deliveries")
        jobs = (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events")
        answers = [server.http.get(path).json() for path in (*paths, *jobs)]
        assert made["secret"] not in json.dumps(answers)


def test_allowed_hosts_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMILL_WEBHOOK_ALLOWED_HOSTS", "Hooks.internal, 10.0.0.5,::1")
    assert Settings().webhook_allowed_hosts == ("hooks.internal", "10.0.0.5", "::1")
    for wrong in ("http://hooks", "hooks:8080", "[::1]", "a b", "hooks/"):
        monkeypatch.setenv("BITMILL_WEBHOOK_ALLOWED_HOSTS", wrong)
        with pytest.raises(ValueError, match="is not a host"):
            Settings()


def test_a_resolver_that_hangs_keeps_nobody_else_waiting(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More webhooks at once than there are threads for all routes."""
    answers = threading.Event()

    def hang(*_: Any, **__: Any) -> list[Any]:
        answers.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    def make(number: int) -> int:
        body = {"url": f"https://slow-{number}.example/hook"}
        return int(server.http.post("/v1/webhooks", json=body).status_code)

    with ThreadPoolExecutor(61) as pool:
        made = [pool.submit(make, number) for number in range(60)]
        try:
            listed = [pool.submit(server.http.get, "/v1/webhooks").result(10) for _ in range(5)]
        finally:
            answers.set()
        assert {answer.status_code for answer in listed} == {200}
        assert {each.result(30) for each in made} == {201}
