"""Models in S3 in a submission: planned from headers, pinned, and only from where the project may read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from api.jobs.ledger.models import Job
from api.security import Scope
from api.settings import Settings
from compression.checkpoint.headers import read_checkpoint
from tests.api.conftest import Server
from tests.api.projects.limiting import limit
from tests.api.test_security import new_server_key
from tests.support.s3 import S3Server

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

PREFIX = "s3://texts/api"
MODEL = f"{PREFIX}/models/tiny"


@pytest.fixture(scope="module")
def _models(s3: S3Server, tiny_llama: Path) -> None:
    for key in ("api/models/tiny", "api/store/tiny", "elsewhere/tiny"):
        s3.put_folder(tiny_llama, key)


@pytest.fixture(autouse=True)
def _a_reader(_models: None, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, tmp_path)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    store_url = f"{PREFIX}/store"
    return settings.model_copy(update={"s3_prefixes": (PREFIX, "s3://private"), "store_url": store_url})


def refused(server: Server, status: int = 422, **changes: Any) -> list[tuple[str, str]]:
    answer = server.http.post("/v1/jobs", json=server.body(**changes))
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert problem["hint"]
    return [(error["pointer"], error["code"]) for error in problem["errors"]]


def test_a_model_is_planned_from_its_headers_and_pinned(
    server: Server, tiny_llama: Path, tmp_path: Path
) -> None:
    submitted = server.submit(model=MODEL)
    job = server.http.get(f"/v1/jobs/{submitted['id']}").json()
    weights = read_checkpoint(tiny_llama).weight_bytes
    assert (job["model"], job["layers_total"]) == (MODEL, 2)
    assert (job["plan"]["source"], job["plan"]["source_bytes"]) == ("tiny", weights)
    kept = [path.stat().st_blocks * 512 for path in (tmp_path / "huggingface").rglob("*.safetensors")]
    assert 0 < sum(kept) < weights / 5
    with server.database.read() as session:
        source = session.get_one(Job, job["id"]).source
    assert re.fullmatch(rf"{MODEL}@[0-9a-f]{{64}}", source)
    again = server.submit(model=source)
    assert again["model"] == source


def test_what_a_project_may_not_read_is_refused_unseen(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    elsewhere = ("s3://texts/elsewhere/tiny", "s3://texts/apiary/tiny", f"{PREFIX}/../elsewhere/tiny")
    stores = (f"{PREFIX}/store/tiny", f"{PREFIX}/store")
    for model in (*elsewhere, *stores, "s3://texts", "s3://"):
        assert refused(server, model=model) == [("/model", "path_not_allowed")], model


def test_nobody_reads_models_where_another_writes(server: Server) -> None:
    limit(server.database, output_prefixes=[f"{PREFIX}/models"])
    other = new_server_key(server, "other", Scope.SUBMIT)
    assert server.submit(model=MODEL)["status"] == "queued"
    answer = server.http.post("/v1/jobs", json=server.body(model=MODEL), headers=other)
    assert (answer.status_code, answer.json()["code"]) == (422, "path_not_allowed")


def test_a_project_reads_models_by_its_own_prefixes(server: Server) -> None:
    limit(server.database, s3_prefixes=["s3://texts/elsewhere"])
    assert server.submit(model="s3://texts/elsewhere/tiny")["status"] == "queued"
    assert refused(server, model=MODEL) == [("/model", "path_not_allowed")]


def test_what_is_not_there_is_refused(server: Server) -> None:
    for model in (f"{PREFIX}/models", f"{PREFIX}/nothing"):
        assert refused(server, model=model) == [("/model", "model_not_found")]
    assert refused(server, model="s3://private/tiny") == [("/model", "s3_access_denied")]
    assert refused(server, model=f"{MODEL}@{'0' * 64}") == [("/model", "model_changed")]


def test_a_store_that_does_not_answer_is_a_503(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    answer = server.http.post("/v1/jobs", json=server.body(model=MODEL))
    assert (answer.status_code, answer.json()["code"]) == (503, "s3_unreachable")
    assert answer.headers["Retry-After"] == "30"


def test_a_change_makes_another_job(server: Server, s3: S3Server) -> None:
    s3.put_folder(server.model, "api/changing")
    jobs = [server.submit(model=f"{PREFIX}/changing")]
    s3.put("api/changing/README.md", b"A card.")
    jobs += [server.submit(model=f"{PREFIX}/changing") for _ in range(2)]
    with server.database.read() as session:
        first, second, third = [session.get_one(Job, job["id"]).source for job in jobs]
    assert first != second == third
