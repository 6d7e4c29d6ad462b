"""GET /v1/jobs/{job_id} beside a route that only makes its SELECT, and one that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.console import say
from benchmarks.load.client import Target, Times, as_fast_as_it_goes, at_rate, gets
from benchmarks.load.machine import Api
from benchmarks.load.server import EMPTY, ROW

ROUNDS = 5
_SECONDS = 2.0
_CONNECTIONS = 16


@dataclass(frozen=True)
class _Run:
    times: Times
    busy: float


async def measure(api: Api, what: str, job_ids: Sequence[str]) -> None:
    """Rounds in which the three alternate, then this call at half of the rate that it reached."""
    job = gets([f"/v1/jobs/{job_id}" for job_id in job_ids], api.key)
    row = gets([f"{ROW}{api.project}/{job_id}" for job_id in job_ids], api.key)
    targets = {"job": job, "row": row, "empty": gets([EMPTY], api.key)}
    for target in targets.values():
        await _run(api, target, 1)
    say(f"\nGET of {what}\n")
    say("| round | job, 1/s | row, 1/s | empty, 1/s | job / row | job / empty | server's core |")
    say("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rounds = []
    for number in range(1, ROUNDS + 1):
        runs = {name: await _run(api, target, _SECONDS) for name, target in targets.items()}
        rounds.append({name: run.times.rate for name, run in runs.items()})
        busy = min(run.busy for run in runs.values())
        say(f"| {number} | {_cells(rounds[-1])} | {busy:.0%} |")
    say(f"| median | {_cells({name: median(each[name] for each in rounds) for name in targets}, rounds)} | |")
    rate = median(each["job"] for each in rounds) / 2
    times = await at_rate(api.port, job, rate=rate, seconds=2 * _SECONDS)
    p50, p99 = (times.milliseconds(percent) for percent in (50, 99))
    say(f"\nAt half of that load, {rate:.0f}/s: p50 {p50:.1f}, p99 {p99:.1f} ms")


async def _run(api: Api, target: Target, seconds: float) -> _Run:
    before = api.cpu_seconds()
    times = await as_fast_as_it_goes(api.port, target, connections=_CONNECTIONS, seconds=seconds)
    return _Run(times, (api.cpu_seconds() - before) / times.seconds)


def _cells(rates: dict[str, float], rounds: Sequence[dict[str, float]] = ()) -> str:
    ratios = [median(each["job"] / each[other] for each in rounds or [rates]) for other in ("row", "empty")]
    return " | ".join([*(f"{rate:.0f}" for rate in rates.values()), *(f"{ratio:.3f}" for ratio in ratios)])
