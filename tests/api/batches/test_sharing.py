"""What jobs of a batch share, so that a thousand take hardly longer than one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from api.errors import Unprocessable
from api.jobs.submission.planning import PlannedJob, Planner
from api.jobs.submission.request import JobSubmit
from api.main import create_app
from api.projects.prefixes import S3Access
from tests.api.conftest import Server
from tests.support.hub import running_hub


def planner_of(server: Server) -> Planner:
    return Planner(server.settings, S3Access(server.settings.store_url))


def planned(planner: Planner, server: Server, **changes: Any) -> PlannedJob:
    return planner.plan(JobSubmit.model_validate(server.body(**changes)))


def test_the_same_work_is_planned_once(server: Server) -> None:
    planner = planner_of(server)
    first, second = planned(planner, server, name="a"), planned(planner, server, name="b", priority=1)
    assert first.shared is second.shared
    assert (first.body.name, second.body.name) == ("a", "b")
    other_seed = planned(planner, server, calibration={**server.body()["calibration"], "seed": 1})
    assert first.shared is other_seed.shared
    assert (first.body.calibration.seed, other_seed.body.calibration.seed) == (0, 1)
    for changes in (
        {"scheme": "W8A16"},
        {"calibration": {"num_calibration_samples": 3}},
        {"evaluation": {"enabled": False}},
        {"dataset": None, "method": "rtn"},
        {"require": "vllm"},
    ):
        other = planned(planner, server, **changes)
        assert other.shared is not first.shared
        alone = planned(planner_of(server), server, **changes)
        assert other.shared.document == alone.shared.document
        assert other.shared.sha256 == alone.shared.sha256


def test_headers_are_read_once_for_all_recipes(server: Server) -> None:
    planner = planner_of(server)
    decided = [planned(planner, server, scheme=scheme).shared for scheme in ("W4A16", "W8A8")]
    one, other = (each.plan.checkpoint for each in decided)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(one.tensors[name] is other.tensors[name] for name in one.tensors)


def test_what_is_refused_stays_refused_and_points_into_its_own_body(server: Server) -> None:
    planner = planner_of(server)
    (server.model / "model.safetensors").write_bytes(b"\xff" * 8)
    recipe = [{"type": "rtn", "scheme": "W4A16", "group_size": 48}]
    for changes in ({}, {"scheme": None, "recipe": recipe}, {}):
        with pytest.raises(Unprocessable) as refusal:
            planned(planner, server, **changes)
        assert [problem.pointer for problem in refusal.value.problems] == ["/model"]


def test_a_model_on_the_hub_is_asked_for_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        hub.add_model("someone/tiny", tiny_llama)

        def asked(jobs: list[dict[str, Any]]) -> int:
            before = hub.requests.total()
            assert server.http.post("/v1/batches", json={"jobs": jobs}).status_code == 202
            return hub.requests.total() - before

        there, missing = server.body(model="someone/tiny"), server.body(model="someone/nothing")
        asked([there])  # its headers are kept from now on
        assert asked([there, missing]) == asked([{**there, "priority": n} for n in range(5)] + [missing] * 5)


@contextmanager
def statements(app: Any) -> Iterator[list[str]]:
    """The SQL that an app runs meanwhile, many rows in one statement counted once."""
    told: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        told.append(statement)

    engine = app.state.context.database.engine
    event.listen(engine, "before_cursor_execute", listen)
    yield told
    event.remove(engine, "before_cursor_execute", listen)


def test_more_jobs_take_no_more_statements(server: Server) -> None:
    app = create_app(server.settings)
    spent = []
    with TestClient(app) as http:
        http.headers["Authorization"] = server.http.headers["Authorization"]
        http.get("/v1/jobs")  # the first use of a key in an hour is noted
        for size in (2, 40):
            with statements(app) as submitting:
                answer = http.post("/v1/batches", json={"jobs": [server.body()] * size})
            assert answer.json()["counts"]["accepted"] == size
            with statements(app) as cancelling:
                answer = http.post(f"/v1/batches/{answer.json()['id']}/cancel")
            assert answer.json()["counts"]["cancelled"] == size
            assert not any("event_seq = event_seq" in statement for statement in submitting)
            spent.append((len(submitting), len(cancelling)))
    assert spent[0] == spent[1]
