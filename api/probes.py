"""Checks of things that may hang: the caller can stop waiting, and a check that hangs is not started
again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Probe(Generic[T]):
    """A question that is asked in a thread of its own.

    While it has no answer it is not asked again: all who ask wait for the same one, so that what hangs keeps
    one thread and one connection, however often it is asked.
    """

    def __init__(self, name: str, ask: Callable[[], T]) -> None:
        self.name = name
        self._ask = ask
        self._lock = threading.Lock()
        self._answer: Future[T] | None = None

    def begin(self) -> Future[T]:
        """The answer to come. Waiting for it, and giving up, is the caller's."""
        with self._lock:
            if self._answer is None or self._answer.done():
                self._answer = Future()
                self._answer.set_running_or_notify_cancel()  # from here on no caller can cancel it for all
                threading.Thread(target=self._run, args=(self._answer,), name=self.name, daemon=True).start()
            return self._answer

    def _run(self, answer: Future[T]) -> None:
        try:
            answer.set_result(self._ask())
        except Exception as error:
            answer.set_exception(error)
