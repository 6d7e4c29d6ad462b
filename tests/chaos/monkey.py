"""What kills: a schedule that a seed decides, and the thread that follows it.

It is the supervisor too, as systemd would be: whatever does not run is started again after a pause.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.chaos.stack import ENGINE, Stack

PAUSE_SECONDS = (0.5, 3.0)
"""How long a victim stays away, at least and at most."""
_TICK_SECONDS = 0.05


@dataclass(frozen=True)
class Kill:
    """One victim's end. at: seconds from the beginning. which: of several engines, as a share of 1. pause:
    seconds until it is started again."""

    at: float
    victim: str
    which: float
    pause: float


def schedule(seed: int, seconds: float, victims: Sequence[str], every: float) -> list[Kill]:
    """Kills at random moments, one in `every` so many seconds. Each victim has a turn before one has two."""
    chance = random.Random(seed)
    kills: list[Kill] = []
    at = chance.expovariate(1 / every)
    while at < seconds:
        if len(kills) % len(victims) == 0:
            deck = chance.sample(victims, len(victims))
        kills.append(Kill(at, deck[len(kills) % len(deck)], chance.random(), chance.uniform(*PAUSE_SECONDS)))
        at += chance.expovariate(1 / every)
    return kills


class Monkey:
    """Kills by the schedule while the block runs, and starts again what is dead.

    killed: how many of what. ended: how often something ended by itself.
    """

    def __init__(self, stack: Stack, kills: Sequence[Kill]) -> None:
        self._stack = stack
        self._kills = list(kills)
        self._due: dict[str, float] = {}  # when a program is started again
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monkey")
        self.killed: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._done.wait(_TICK_SECONDS):
            now = time.monotonic() - began
            while self._kills and self._kills[0].at <= now:
                self._kill(self._kills.pop(0), now)
            self._start_again(now)

    def _kill(self, kill: Kill, now: float) -> None:
        if kill.victim == ENGINE:
            self._kill_engine(kill.which)
        elif self._stack.programs[kill.victim].is_running():
            self._stack.programs[kill.victim].kill()
            self._due[kill.victim] = now + kill.pause
            self.killed[kill.victim] += 1

    def _kill_engine(self, which: float) -> None:
        engines = self._stack.engines()
        with suppress(IndexError, ProcessLookupError):  # none runs now
            os.kill(engines[int(which * len(engines))], signal.SIGKILL)
            self.killed[ENGINE] += 1

    def _start_again(self, now: float) -> None:
        for name, program in self._stack.programs.items():
            if program.is_running():
                continue
            if name not in self._due:
                self.ended[name] += 1
                self._due[name] = now + PAUSE_SECONDS[0]
            elif self._due[name] <= now:
                del self._due[name]
                program.begin()
