"""Writers of one SQLite file, in the order in which they came.

SQLite lets one connection write at a time. The others poll, each for itself, and give up after the busy
timeout, whoever came first: of eighty at once, half gave up. In one process they wait here instead.
"""

from __future__ import annotations

import threading
from collections import deque


class WriteQueue:
    """A lock that is handed to whoever has waited longest. Any thread may release it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, seconds: float) -> bool:
        """Wait for the turn, at most that long. Returns whether it came."""
        turn = threading.Event()
        with self._mutex:
            if not self._is_held:
                self._is_held = True
                return True
            self._waiting.append(turn)
        if turn.wait(seconds):
            return True
        with self._mutex:
            if turn.is_set():  # it came in the last moment
                return True
            self._waiting.remove(turn)
        return False

    def release(self) -> None:
        """End the turn, and begin the next one."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_held = False


_queues: dict[str, WriteQueue] = {}
_queues_mutex = threading.Lock()


def write_queue(file: str) -> WriteQueue:
    """The queue of this process for that file, whichever engine writes to it."""
    with _queues_mutex:
        return _queues.setdefault(file, WriteQueue())
