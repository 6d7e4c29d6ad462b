"""GET /v1/jobs/{job_id} beside routes that only make its SELECT, and one that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.console import say
from benchmarks.load.client import Target, as_fast_as_it_goes, at_rate, gets
from benchmarks.load.machine import Api
from benchmarks.load.server import BARE, EMPTY, ROW

ROUNDS = 15
_SECONDS = 1.0
_CONNECTIONS = 16


@dataclass(frozen=True)
class _Run:
    """rate: answers a second. cpu: seconds of the server's core for an answer."""

    rate: float
    cpu: float


async def measure(api: Api, what: str, job_ids: Sequence[str]) -> None:
    """Rounds in which they take turns, then the job alone at half of the rate that it reached."""
    job = gets([f"/v1/jobs/{job_id}" for job_id in job_ids], api.key)
    targets = {"job": job}
    for name, path in {"row": ROW, "bare": BARE}.items():
        targets[name] = gets([f"{path}{api.project}/{job_id}" for job_id in job_ids], api.key)
    targets["empty"] = gets([EMPTY], api.key)
    for target in targets.values():
        await _run(api, target, _SECONDS / 2)
    say(f"\nGET of {what}\n")
    say("| round | job, row, bare, empty: 1/s | ms of the server's core | job / row | / bare | / empty |")
    say("| --- | ---: | ---: | ---: | ---: | ---: |")
    rounds = []
    for number in range(1, ROUNDS + 1):
        rounds.append({name: await _run(api, target, _SECONDS) for name, target in targets.items()})
        say(f"| {number} | {_cells(rounds[-1:])} |")
    say(f"| median | {_cells(rounds)} |")
    rate = median(each["job"].rate for each in rounds) / 2
    times = await at_rate(api.port, job, rate=rate, seconds=4 * _SECONDS)
    p50, p99 = (times.milliseconds(percent) for percent in (50, 99))
    say(f"\nAt half of that load, {rate:.0f}/s: p50 {p50:.1f}, p99 {p99:.1f} ms")


async def _run(api: Api, target: Target, seconds: float) -> _Run:
    before = api.cpu_seconds()
    times = await as_fast_as_it_goes(api.port, target, connections=_CONNECTIONS, seconds=seconds)
    return _Run(times.rate, (api.cpu_seconds() - before) / len(times.each))


def _cells(rounds: Sequence[dict[str, _Run]]) -> str:
    """Medians of these rounds."""
    rates = (median(each[name].rate for each in rounds) for name in rounds[0])
    cpu = (1000 * median(each[name].cpu for each in rounds) for name in rounds[0])
    others = [name for name in rounds[0] if name != "job"]
    ratios = (median(each["job"].rate / each[name].rate for each in rounds) for name in others)
    cells = [", ".join(f"{rate:.0f}" for rate in rates), ", ".join(f"{each:.2f}" for each in cpu)]
    return " | ".join([*cells, *(f"{ratio:.3f}" for ratio in ratios)])
