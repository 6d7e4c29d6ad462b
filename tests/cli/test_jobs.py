"""submit, jobs, cancel and download, against a real server."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.bitmill import command, environment
from tests.cli.conftest import Server


@pytest.fixture(scope="module")
def finished(server: Server) -> dict[str, Any]:
    """What `submit --wait --json` says of a job with data."""
    result = server.submit("--wait", "--json", *server.calibrated, "--name", "first", "--label", "team=a")
    assert result.code == 0, result.err + result.out
    answer: dict[str, Any] = result.json
    return answer


def test_a_waited_for_job_gives_its_end_and_its_report(finished: dict[str, Any]) -> None:
    job, report = finished["job"], finished["report"]
    assert (job["status"], job["method"], job["name"], job["labels"]) == (
        "succeeded",
        "gptq",
        "first",
        {"team": "a"},
    )
    assert report["evaluation"]["perplexity_original"] > 1
    assert report["totals"]["output_bytes"] < report["totals"]["source_bytes"]


def test_a_download_is_what_the_manifest_says(
    server: Server, finished: dict[str, Any], tmp_path: Path
) -> None:
    result = server.bitmill("download", finished["job"]["id"], "--output-dir", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    files = result.json["files"]
    assert {"config.json", "recipe.yaml", "model.safetensors.index.json"} <= {file["name"] for file in files}
    for file in files:
        content = (tmp_path / "out" / file["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_an_interrupted_download_goes_on_and_a_changed_file_is_replaced(
    server: Server, finished: dict[str, Any], tmp_path: Path
) -> None:
    job = finished["job"]["id"]
    assert server.bitmill("download", job, "--output-dir", tmp_path).code == 0
    shard = next(tmp_path.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    config = tmp_path / "config.json"
    meant = config.read_bytes()
    config.write_bytes(bytes(len(meant)))
    assert server.bitmill("download", job, "--output-dir", tmp_path).code == 0
    assert shard.read_bytes() == whole
    assert config.read_bytes() == meant


def test_who_waits_on_a_terminal_sees_a_live_bar_and_then_a_table(server: Server) -> None:
    ours, theirs = pty.openpty()
    settings = {"DATA_DIR": str(server.home / "data")}
    arguments = ("submit", server.model, "--scheme", "W4A16", "--group-size", "32", "--no-cache", "--wait")
    with subprocess.Popen(
        command(*arguments, *server.calibrated),
        env={**environment(server.home, settings), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as process:
        os.close(theirs)
        shown = _read_all(ours)
        assert process.stdout is not None
        result = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    assert "2/2 layers" in shown
    assert "relative error" in shown
    assert "\x1b[2K" in shown  # it was drawn over, again and again
    commands = ("bitmill download job_", "vllm serve tiny-W4A16")
    for asked in ("size", "perplexity", "seconds", "solve", "peak memory", *commands):
        assert asked in result


def test_a_job_that_fails_is_exit_code_1_with_its_reason(server: Server) -> None:
    result = server.submit("--wait", *server.calibrated, "--max-perplexity-ratio", "0.5")
    assert result.code == 1
    assert "failed: quality_gate_failed" in result.err
    # Where stderr is no terminal, progress is lines.
    assert re.search(r"^layer 2/2  relative error \d\.\d\de-\d\d  .* left$", result.err, re.MULTILINE)


def test_what_was_made_is_there_at_once(server: Server, finished: dict[str, Any]) -> None:
    told = server.submit(*server.calibrated, "--cache")
    assert (told.code, "is succeeded, as job_" in told.out) == (0, True)
    waited = server.submit(*server.calibrated, "--cache", "--wait", "--json").json
    assert waited["job"]["deduplicated_from"] in told.out
    assert waited["report"]["totals"]["output_bytes"] == finished["report"]["totals"]["output_bytes"]
    seen = server.submit(*server.calibrated, "--cache", "--wait").out
    assert re.search(r"^found: the same work was done before, .* s then *\nby job_\w+", seen, re.MULTILINE)


def test_a_waiting_job_is_cancelled_at_once(server: Server) -> None:
    job = server.submit("--device-class", "cuda", "--json").json["id"]
    cancelled = server.bitmill("cancel", job, "--json")
    assert (cancelled.code, cancelled.json["status"]) == (0, "cancelled")


def test_jobs_lists_the_newest_first_and_filters(server: Server, finished: dict[str, Any]) -> None:
    job = server.submit("--device-class", "cuda", "--json").json["id"]
    everything = server.bitmill("jobs", "--json").json["jobs"]
    assert everything[0]["id"] == job
    assert finished["job"]["id"] in [each["id"] for each in everything]
    queued = server.bitmill("jobs", "--status", "queued", "--json").json["jobs"]
    assert [each["id"] for each in queued] == [job]
    assert len(server.bitmill("jobs", "--limit", "1", "--json").json["jobs"]) == 1
    table = server.bitmill("jobs").out
    assert job in table
    assert "queued" in table
    server.bitmill("cancel", job)


def test_the_same_idempotency_key_gives_the_same_job(server: Server) -> None:
    options = ("--device-class", "cuda", "--idempotency-key", "once", "--json")
    first, second = (server.submit(*options).json["id"] for _ in range(2))
    assert first == second
    server.bitmill("cancel", first)


def test_a_recipe_file_is_a_whole_recipe(server: Server, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps:\n- {type: rtn, scheme: FP8_DYNAMIC, ignore: [lm_head, 're:.*down_proj']}\n")
    options = ("--recipe", recipe, "--device-class", "cuda", "--json")
    job = server.bitmill("submit", server.model, *options).json
    assert (job["scheme"], job["method"]) == ("FP8_DYNAMIC", "rtn")
    assert json.dumps("re:.*down_proj") in json.dumps(job["recipe"])
    server.bitmill("cancel", job["id"])


def _read_all(terminal: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode()
