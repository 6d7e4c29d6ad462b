"""batch submit, list, show and cancel, against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Server


def job(server: Server, **more: Any) -> dict[str, Any]:
    """The cheapest job; on a class of device that no worker has, it waits."""
    waits = {"resources": {"device_class": "cuda"}}
    return {"model": str(server.model), "scheme": "W4A16", "group_size": 32, **waits, **more}


@pytest.fixture
def lines(server: Server, tmp_path: Path) -> Path:
    """A job, and two that are refused."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"{json.dumps(job(server))}\nnot json\n{json.dumps(job(server, scheme='W5A16'))}\n")
    return file


def test_what_is_refused_is_told_and_the_rest_goes_on(server: Server, lines: Path) -> None:
    result = server.bitmill("batch", "submit", lines, "--name", "a few")
    assert result.code == 4
    assert "1 of 3 jobs are accepted" in result.out
    assert "item 1: invalid_json" in result.err
    assert "item 2: unknown_scheme" in result.err
    (batch,) = server.bitmill("batch", "list", "--limit", "1", "--json").json["batches"]
    assert (batch["name"], batch["counts"]["queued"], batch["counts"]["refused"]) == ("a few", 1, 2)
    table = server.bitmill("batch", "list").out
    assert batch["id"] in table
    assert "2 refused, 1 queued" in table
    shown = server.bitmill("batch", "show", batch["id"])
    assert (shown.code, "item 2: unknown_scheme" in shown.err) == (0, True)
    (listed,) = server.bitmill("jobs", "--batch", batch["id"], "--json").json["jobs"]
    assert listed["batch"] == {"id": batch["id"], "index": 0}
    cancelled = server.bitmill("batch", "cancel", batch["id"])
    assert (cancelled.code, cancelled.out) == (0, f"{batch['id']}: 2 refused, 1 cancelled.\n")
    ended = server.bitmill("batch", "show", batch["id"], "--wait", "--json")
    assert (ended.code, ended.json["counts"]["cancelled"], ended.err) == (1, 1, "")


def test_a_sweep_to_its_end(server: Server, tmp_path: Path) -> None:
    base = {
        name: value for name, value in job(server).items() if name not in ("model", "scheme", "resources")
    }
    sweep = {"models": [str(server.model)], "schemes": ["W4A16", "W8A16"], "base": base}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"name": "sweep", "sweep": sweep}))
    once, again = (
        server.bitmill("batch", "submit", file, "--idempotency-key", "sweep", "--json") for _ in range(2)
    )
    assert (once.code, once.json["counts"]["accepted"]) == (0, 2)
    assert again.json["id"] == once.json["id"]
    result = server.bitmill("batch", "show", once.json["id"], "--wait")
    assert result.code == 0, result.err
    assert result.err.splitlines()[-1] == "2/2 jobs  2 succeeded"
    assert "2/2" in result.out


def test_what_is_no_file_of_jobs(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for file in (broken, tmp_path / "nothing.jsonl"):
        result = server.bitmill("batch", "submit", file, "--json")
        assert (result.code, result.json["error"]["code"]) == (2, "bad_file")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    result = server.bitmill("batch", "submit", empty, "--json")
    assert (result.code, result.json["error"]["code"]) == (4, "batch_empty")
    result = server.bitmill("batch", "cancel", "batch_x", "--json")
    assert (result.code, result.json["error"]["code"]) == (4, "batch_not_found")
