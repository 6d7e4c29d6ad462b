"""One run: jobs are submitted while programs are killed, the rest is worked off, and promises are checked."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from api.jobs.ledger.models import Attempt
from tests.chaos import invariants
from tests.chaos.invariants import Deaths
from tests.chaos.load import Load
from tests.chaos.monkey import Monkey, schedule
from tests.chaos.stack import ENGINE, Bitmill, Stack

ENGINE_SECONDS = 5
"""Until no engine is left when nothing of it is wanted any more."""
_SUBMITTED = 0.8
"""The share of the kills' time over which jobs are submitted."""
_TELL_SECONDS = 1.0

MakeStack = Callable[[Path], AbstractContextManager[Stack]]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """jobs: submitted during the kills, which come for `seconds`, one in `every` so many. drain_seconds: for
    what is left then, at most."""

    seed: int
    jobs: int
    seconds: float
    every: float
    drain_seconds: float


@dataclass
class Result:
    """What happened. complaints: promises that were not kept. ended: what ended by itself, since something
    that it begins with was away."""

    complaints: list[str]
    killed: Counter[str]
    ended: Counter[str]
    refused: Counter[str]
    outcomes: Counter[str] = field(default_factory=Counter)
    drained_seconds: float = 0.0


def run(make: MakeStack, plan: Plan, tell: Tell) -> Result:
    """Do it. The folder with all logs stays where something is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with make(folder) as stack:
        result = _run(stack, plan, tell)
        stack.kill()
        result.complaints += _left(stack)
    if result.complaints:
        result.complaints.append(f"The logs are in {folder}.")
    else:
        shutil.rmtree(folder)
    return result


def _run(stack: Stack, plan: Plan, tell: Tell) -> Result:
    kills = schedule(plan.seed, plan.seconds, stack.victims, plan.every)
    began = time.monotonic()
    with (
        Monkey(stack, kills) as monkey,
        Load(stack, plan.jobs, _SUBMITTED * plan.seconds) as load,
    ):
        while (spent := time.monotonic() - began) < plan.seconds + plan.drain_seconds:
            if spent >= plan.seconds and load.is_over():
                break
            time.sleep(_TELL_SECONDS)
            states = ", ".join(f"{count} {status}" for status, count in sorted(load.statuses.items()))
            tell(f"{spent:4.0f} s  {monkey.killed.total()} kills  {len(load.accepted)} accepted: {states}")
    result = Result(load.complaints, monkey.killed, monkey.ended, load.refused)
    result.drained_seconds = time.monotonic() - began - plan.seconds
    stack.begin()
    if load.is_over():
        result.complaints += _left(stack)
    deaths = Deaths(_killed_workers(stack), monkey.killed[ENGINE])
    with closing(stack.database()) as database, database.read() as session:
        result.complaints += invariants.check(session, stack.store(), load.accepted, deaths)
        outcomes = session.scalars(select(Attempt.outcome))
        result.outcomes = Counter(str(outcome) for outcome in outcomes)
    return result


def _killed_workers(stack: Stack) -> frozenset[int]:
    """Ids of those processes; what `bitmill serve` ran is given back at its next start."""
    workers = [program for name, program in stack.programs.items() if name.startswith("worker")]
    return frozenset(pid for program in workers if isinstance(program, Bitmill) for pid in program.killed)


def _left(stack: Stack) -> list[str]:
    """Engines that nobody waits for any more."""
    give_up = time.monotonic() + ENGINE_SECONDS
    while (engines := stack.engines()) and time.monotonic() < give_up:
        time.sleep(0.1)
    return [f"the engine {pid} is left" for pid in engines]
