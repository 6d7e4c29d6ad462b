"""Where a run's time went."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compression.machine.host_memory import give_back


class Clock:
    """Seconds by phase. Phases do not nest: an inner one is taken out of the outer one's time.

    Memory is planned by phases too. So each one begins by giving the system what the last one freed.

    device: "cpu" or "cuda:N". A GPU works on after the call that gave it the work has returned. So the clock
    waits for it where a phase begins and ends, and each phase has the time of its own work.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._started = time.perf_counter()
        self._inner = 0.0

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def phase(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """Count the time inside the block as `name`.

        waits=False: the host's time alone, for a part of a phase that is entered so often that waits would
        keep the device from working ahead. What is left to do there counts where it is waited for next.
        """
        if waits:
            self._wait()
        start, outer = time.perf_counter(), self._inner
        self._inner = 0.0
        give_back()
        try:
            yield
            if waits:
                self._wait()
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner
            self._inner = outer + elapsed

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
