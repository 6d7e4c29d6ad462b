"""Who uses the service meanwhile: submits jobs at even intervals, and looks at them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

import httpx

from tests.chaos.stack import Stack

_AGAIN_SECONDS = 0.3
_LOOK_SECONDS = 1.0
_PROBLEM = "application/problem+json"


class Load:
    """Submits `jobs` jobs, spread over `seconds`, while the block runs.

    A submission whose answer was lost is sent again under its Idempotency-Key. accepted: their ids.
    complaints: answers that a client should never see. refused: how often the API was not there, or said 503.
    """

    def __init__(self, stack: Stack, jobs: int, seconds: float) -> None:
        self._stack = stack
        self._jobs = jobs
        self._seconds = seconds
        self._client = stack.client()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._submit_all), threading.Thread(target=self._look)]
        self.accepted: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def is_over(self) -> bool:
        """Whether all jobs were accepted and, when last looked at, had succeeded."""
        return len(self.accepted) == self._jobs == self.statuses["succeeded"]

    def _submit_all(self) -> None:
        began = time.monotonic()
        for number in range(self._jobs):
            self._closed.wait(max(0.0, began + number * self._seconds / self._jobs - time.monotonic()))
            headers = {"Idempotency-Key": f"job-{number}"}
            while not self._closed.is_set():
                job = self._ask("POST", "/v1/jobs", 202, json=self._stack.body(number), headers=headers)
                if job is not None:
                    self.accepted.append(job["id"])
                    break
                self._closed.wait(_AGAIN_SECONDS)

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            page = self._ask("GET", "/v1/jobs?limit=100", 200)
            if page is not None:
                self.statuses = Counter(job["status"] for job in page["items"])

    def _ask(self, method: str, path: str, expected: int, **more: Any) -> Any:
        """The answer; None where the API is not there, or says that something behind it is not."""
        try:
            answer = self._client.request(method, path, **more)
        except httpx.TransportError:
            self.refused["not there"] += 1
            return None
        if answer.status_code == expected:
            return answer.json()
        self.refused[str(answer.status_code)] += 1
        told = answer.status_code == 503 and answer.headers.get("Content-Type") == _PROBLEM
        if not (told and "Retry-After" in answer.headers):
            self.complaints.append(f"{method} {path} was answered {answer.status_code}: {answer.text[:500]}")
        return None
