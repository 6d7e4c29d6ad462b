"""API keys: made once, kept as digests, bound to a project and to scopes."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from api import database as clock
from api.database import Database
from api.main import create_app
from api.projects.models import ApiKey
from api.projects.repository import get_or_create_project
from api.projects.schemas import KeyCreate
from api.projects.service import create_key, ensure_first_key
from api.security import KeyHasher, Scope, is_well_formed, new_key
from api.settings import Settings
from tests.api.conftest import Server


def new_server_key(server: Server, project: str, *scopes: Scope) -> dict[str, str]:
    with server.database.write() as session:
        owner = get_or_create_project(session, project)
        asked = KeyCreate(name="test", scopes=list(scopes))
        made = create_key(session, KeyHasher.from_settings(server.settings), owner.id, asked)
    return {"Authorization": f"Bearer {made.key}"}


def test_keys_are_random_and_checked() -> None:
    one, other = new_key(), new_key()
    assert one != other
    assert is_well_formed(one)
    assert not is_well_formed(one[:-1])
    assert not is_well_formed(one.swapcase())
    assert not is_well_formed(one.removeprefix("bitmill_"))
    assert not is_well_formed("")
    assert not is_well_formed("bitmill_" + "é" * 38)


def test_the_digest_is_hmac_sha256() -> None:
    expected = hmac.new(b"secret", b"key", hashlib.sha256).hexdigest()
    assert KeyHasher(b"secret").digest("key") == expected


def test_one_secret_for_processes_that_start_at_once(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: KeyHasher.from_settings(settings).digest("key"), range(16)))
    assert len(digests) == 1
    assert [path.name for path in settings.data_dir.iterdir()] == ["secret.key"]
    assert stat.S_IMODE((settings.data_dir / "secret.key").stat().st_mode) == 0o600


def test_the_first_key_is_written_once(server: Server) -> None:
    file = server.settings.credentials_file
    first = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(first)["url"] == "http://127.0.0.1:8080"
    with TestClient(create_app(server.settings)):
        assert file.read_text() == first
    with server.database.read() as session:
        (key,) = session.scalars(select(ApiKey)).all()
    assert json.loads(first)["api_key"] not in json.dumps([key.digest, key.name, key.id])


def test_processes_that_start_at_once_make_one_key(settings: Settings, database: Database) -> None:
    hasher, start = KeyHasher.from_settings(settings), threading.Barrier(4)

    def make(_: int) -> None:
        start.wait()
        with database.write() as session:
            ensure_first_key(session, hasher, settings)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, range(4)))
    with database.read() as session:
        (key,) = session.scalars(select(ApiKey)).all()
    assert key.digest == hasher.digest(json.loads(settings.credentials_file.read_text())["api_key"])


def test_a_crash_before_the_commit_is_made_good(settings: Settings, database: Database) -> None:
    """The file of a start that died is there, its key is not in the database."""
    stale = json.dumps({"url": "http://127.0.0.1:8080", "api_key": new_key()})
    settings.credentials_file.write_text(stale)
    with TestClient(create_app(settings)) as http:
        key = json.loads(settings.credentials_file.read_text())["api_key"]
        assert http.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    with database.read() as session:
        assert len(session.scalars(select(ApiKey)).all()) == 1


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, "missing_key"),
        ({"Authorization": "Basic dXNlcjpwYXNz"}, "missing_key"),
        ({"Authorization": "Bearer nonsense"}, "wrong_key"),
        ({"Authorization": f"Bearer {new_key()}"}, "wrong_key"),
    ],
)
def test_without_the_right_key_nothing_is_told(server: Server, header: dict[str, str], code: str) -> None:
    server.http.headers.pop("Authorization")
    for method, path in [("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/job_1/artifacts/a")]:
        answer = server.http.request(method, path, headers=header, json={} if method == "POST" else None)
        assert answer.status_code == 401
        assert answer.json()["code"] == code
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_revoked_key_is_wrong(server: Server) -> None:
    with server.database.write() as session:
        session.execute(update(ApiKey).values(revoked_at=clock.now(session)))
    assert server.http.get("/v1/jobs").json()["code"] == "wrong_key"
