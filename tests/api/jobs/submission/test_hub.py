"""Models and datasets on the Hub in a submission: planned from headers, pinned to commits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.jobs.ledger.models import Job
from compression.checkpoint.headers import read_checkpoint
from compression.hub.environment import HubEnvironment
from compression.hub.references import HubRef
from compression.hub.snapshots import remember_ref
from tests.api.conftest import Server
from tests.support.hub import Hub, running_hub

MODEL, TEXTS = "someone/tiny", "someone/texts"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        hub.add_model(MODEL, tiny_llama)
        hub.add_model("someone/gated", tiny_llama, gated=True)
        hub.add_dataset(TEXTS, {"train.jsonl": b'{"text": "words"}\n'})
        yield hub


def refused(server: Server, status: int = 422, **changes: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/jobs", json=server.body(**changes))
    assert answer.status_code == status, answer.text
    problem: dict[str, Any] = answer.json()
    return {**problem, "headers": answer.headers}


def test_a_model_is_planned_from_its_headers_and_pinned(server: Server, hub: Hub, tiny_llama: Path) -> None:
    submitted = server.submit(model=MODEL)
    job = server.http.get(f"/v1/jobs/{submitted['id']}").json()
    weights = read_checkpoint(tiny_llama).weight_bytes
    assert (job["model"], job["layers_total"]) == (MODEL, 2)
    assert (job["plan"]["source"], job["plan"]["source_bytes"]) == ("tiny", weights)
    assert hub.served["model.safetensors"] < weights / 5
    with server.database.read() as session:
        assert session.get_one(Job, job["id"]).source == f"{MODEL}@{hub.repositories['models', MODEL].commit}"


def test_headers_of_a_commit_are_fetched_once(server: Server, hub: Hub) -> None:
    server.submit(model=MODEL)
    served = hub.served.total()
    server.submit(model=MODEL)
    assert hub.served.total() == served


@pytest.mark.parametrize(
    "dataset", [TEXTS, {"hub": f"{TEXTS}@main", "split": "train", "text_column": "text"}]
)
def test_a_dataset_is_pinned(server: Server, hub: Hub, dataset: Any) -> None:
    job = server.submit(dataset=dataset)
    assert job["dataset"].startswith(TEXTS)
    with server.database.read() as session:
        row = session.get_one(Job, job["id"])
        assert row.dataset is not None
        assert row.dataset["hub"] == f"{TEXTS}@{hub.repositories['datasets', TEXTS].commit}"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("changes", "pointer", "code"),
    [
        ({"model": "someone/nothing"}, "/model", "hub_repository_not_found"),
        ({"model": f"{MODEL}@v9"}, "/model", "hub_revision_not_found"),
        ({"model": "someone/gated"}, "/model", "hub_access_denied"),
        ({"dataset": "someone/nothing"}, "/dataset", "hub_repository_not_found"),
        ({"dataset": "c4"}, "/dataset", "hub_repository_not_found"),
        ({"dataset": {"hub": f"{TEXTS}@v9"}}, "/dataset", "hub_revision_not_found"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(
    server: Server, changes: dict[str, Any], pointer: str, code: str
) -> None:
    problem = refused(server, **changes)
    assert [(error["pointer"], error["code"]) for error in problem["errors"]] == [(pointer, code)]
    assert problem["hint"]


def test_a_job_that_cannot_succeed_is_refused_before_its_weights_are_here(server: Server, hub: Hub) -> None:
    problem = refused(server, model=MODEL, group_size=48)
    assert "64" in problem["detail"]
    assert (
        not list((server.settings.data_dir.parent / "huggingface").rglob("*.safetensors"))
        or hub.served["model.safetensors"] < 100_000
    )


@pytest.mark.usefixtures("hub")
def test_a_hub_that_does_not_answer_is_a_503(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problem = refused(server, status=503, model=MODEL)
    assert (problem["code"], problem["headers"]["Retry-After"]) == ("hub_unreachable", "30")


def test_offline_only_what_is_cached_is_accepted(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = hub.requests.total()
    assert refused(server, model=MODEL)["code"] == "hub_offline"
    assert refused(server, dataset=TEXTS)["code"] == "hub_offline"
    commit = hub.repositories["datasets", TEXTS].commit
    ref = HubRef.parse(TEXTS)
    assert ref is not None
    remember_ref("dataset", ref, commit, HubEnvironment.read())
    assert server.submit(dataset=TEXTS)["status"] == "queued"
    assert hub.requests.total() == asked
