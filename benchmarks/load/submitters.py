"""POST /v1/jobs from very many at the same moment, and what others wait meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.console import say
from benchmarks.load.machine import Api
from tests.support.submitters import Seen, submit_at_once

SUBMITTERS, ROUNDS = 200, 5
_SCHEMES = ("W4A16", "W8A8")


def measure(api: Api, model: Path, polled: str) -> None:
    """Rounds of submissions of one model; polled: a job that is asked for meanwhile."""
    others = [f"/v1/jobs/{polled}", "/v1/jobs", "/livez", "/readyz"]
    say(f"\n{SUBMITTERS} submissions at once on {api.database.engine.dialect.name}\n")
    say("| round | accepted | s until the last answer | GET a job, the list, /livez, /readyz: slowest, s |")
    say("| --- | ---: | ---: | ---: |")
    for number in range(1, ROUNDS + 1):
        seen = submit_at_once(f"http://127.0.0.1:{api.port}", api.key, _bodies(model, number), others)
        say(f"| {number} | {seen.statuses[202]} | {seen.seconds:.2f} | {_slowest(seen, others)} |")


def _bodies(model: Path, number: int) -> list[dict[str, Any]]:
    """Half of a round ask for the same work, so that each looks for what the others do."""
    return [
        {"model": str(model), "scheme": _SCHEMES[n % 2], "labels": {"round": str(number)}}
        for n in range(SUBMITTERS)
    ]


def _slowest(seen: Seen, others: Sequence[str]) -> str:
    return ", ".join(f"{seen.slowest(path):.2f}" for path in others)
