"""Keys over HTTP: made, listed and revoked by an admin of their project."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from api import database as clock
from api.projects.models import ApiKey
from api.security import Scope, new_key
from tests.api.conftest import Server
from tests.api.test_security import new_server_key


def create(server: Server, *scopes: str, **more: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/keys", json={"name": "a key", "scopes": scopes, **more})
    assert answer.status_code == 201, answer.text
    key: dict[str, Any] = answer.json()
    return key


def listed(server: Server) -> dict[str, dict[str, Any]]:
    return {key["id"]: key for key in server.http.get("/v1/keys").json()["items"]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def set_columns(server: Server, key_id: str, **columns: Any) -> None:
    with server.database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(**columns))


class TestCreate:
    def test_the_key_is_shown_once(self, server: Server) -> None:
        made = create(server, "submit", "read")
        assert made["scopes"] == ["read", "submit"]
        assert server.http.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200
        assert server.http.get("/v1/keys", headers=bearer(made["key"])).status_code == 403
        del made["key"]
        found = listed(server)[made["id"]]
        assert found | {"last_used_at": None} == made
        with server.database.read() as session:
            digest = session.get_one(ApiKey, made["id"]).digest
        assert digest not in json.dumps(listed(server))

    @pytest.mark.parametrize(
        ("body", "pointer"),
        [
            ({"scopes": ["read"]}, "/name"),
            ({"name": "", "scopes": ["read"]}, "/name"),
            ({"name": "a", "scopes": []}, "/scopes"),
            ({"name": "a", "scopes": ["everything"]}, "/scopes/0"),
            ({"name": "a", "scopes": ["read"], "expires_at": "2090-01-01T00:00:00"}, "/expires_at"),
            ({"name": "a", "scopes": ["read"], "expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
            ({"name": "a", "scopes": ["read"], "project": "other"}, "/project"),
        ],
    )
    def test_what_cannot_be_a_key(self, server: Server, body: dict[str, Any], pointer: str) -> None:
        answer = server.http.post("/v1/keys", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
        assert len(listed(server)) == 1


class TestList:
    def test_pages_the_newest_first(self, server: Server) -> None:
        made = [create(server, "read")["id"] for _ in range(4)]
        first = server.http.get("/v1/keys", params={"limit": 3}).json()
        second = server.http.get("/v1/keys", params={"limit": 3, "cursor": first["next_cursor"]}).json()
        assert [key["id"] for key in first["items"]] == made[:0:-1]
        assert [key["name"] for key in second["items"]] == ["a key", "first key"]
        assert second["next_cursor"] is None
        assert server.http.get("/v1/keys", params={"cursor": "x"}).json()["code"] == "bad_cursor"

    def test_a_use_is_noted_once_an_hour(self, server: Server) -> None:
        made = create(server, "read")

        def use() -> Any:
            assert server.http.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200
            return listed(server)[made["id"]]["last_used_at"]

        first = use()
        assert abs(datetime.fromisoformat(first) - datetime.now(UTC)) < timedelta(minutes=1)
        assert use() == first
        long_ago = datetime.fromisoformat(first) - timedelta(minutes=61)
        set_columns(server, made["id"], last_used_at=long_ago)
        assert datetime.fromisoformat(use()) > long_ago + timedelta(minutes=60)


class TestRevoke:
    def test_revoked_expired_and_unknown_look_the_same(self, server: Server) -> None:
        revoked, expired = create(server, "read"), create(server, "read", expires_at="2090-01-01T00:00:00Z")
        for made in (revoked, expired):
            assert server.http.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200
        path = f"/v1/keys/{revoked['id']}"
        assert [server.http.delete(path).status_code for _ in range(2)] == [204, 204]
        with server.database.read() as session:
            set_columns(server, expired["id"], expires_at=clock.now(session))
        answers = [
            server.http.get("/v1/jobs", headers=bearer(key)).json() | {"request_id": ""}
            for key in (revoked["key"], expired["key"], new_key())
        ]
        assert answers[0]["code"] == "wrong_key"
        assert answers[0] == answers[1] == answers[2]
        assert listed(server)[revoked["id"]]["revoked_at"]

    def test_not_the_last_one_for_admin(self, server: Server) -> None:
        (first,) = listed(server)
        create(server, "submit")
        set_columns(server, create(server, "admin")["id"], expires_at=datetime.now(UTC) - timedelta(days=1))
        create(server, "admin")["id"]
        with server.database.write() as session:
            newest = session.scalars(select(ApiKey).order_by(ApiKey.created_at.desc())).first()
            assert newest is not None
        assert server.http.delete(f"/v1/keys/{newest.id}").status_code == 204
        answer = server.http.delete(f"/v1/keys/{first}")
        assert (answer.status_code, answer.json()["code"]) == (409, "last_admin_key")
        assert listed(server)[first]["revoked_at"] is None

    def test_two_admins_that_revoke_each_other_leave_one(self, server: Server) -> None:
        keys = [new_server_key(server, "other", Scope.ADMIN) for _ in range(2)]
        ids = [key["id"] for key in server.http.get("/v1/keys", headers=keys[0]).json()["items"]]
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(
                lambda turn: server.http.delete(f"/v1/keys/{turn[0]}", headers=turn[1]),
                zip(ids, keys, strict=True),
            )
            assert 204 in [answer.status_code for answer in answers]
        usable = [key for key in keys if server.http.get("/v1/keys", headers=key).status_code == 200]
        assert len(usable) == 1


def test_a_project_says_what_it_may_and_uses(server: Server) -> None:
    server.submit()
    project = server.http.get("/v1/project").json()
    assert project["name"] == "default"
    assert project["use"] == {"queued": 1, "running": 0}
    assert project["limits"] == {
        "max_queued": None,
        "max_running": None,
        "max_body_bytes": 200_000,
        "requests_per_minute": None,
    }
