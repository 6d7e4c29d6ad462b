"""Runs an attempt's processes, the fetcher and the engine, and says what their end means for the job."""

from __future__ import annotations

import dataclasses
import signal
import time
from typing import Any

import structlog

from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue.leases import AttemptFacts
from api.store.base import Check, StoreError
from worker.context import ShuttingDown
from worker.engine import EngineProcess
from worker.heartbeat import CancelRequested
from worker.messages import TERMINAL, BadMessage, Message
from worker.outcomes import AttemptFailed
from worker.recorder import EngineRecorder
from worker.runner import REPORT_HINT
from worker.telemetry import AttemptTelemetry

_POLL_SECONDS = 0.2
"""How often a process is looked at: a cancel has to take effect within 5 seconds."""
_DRAIN_SECONDS = 1.0
"""For recording what a stopped engine had reported; a cancel waits for no slow store."""
_RETRYABLE_CODES = ("hub_unreachable", "s3_unreachable")
_FAULTS = (
    signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGSYS, signal.SIGTRAP,
)  # fmt: skip
"""Signals that a process causes itself. Others come from outside: the kernel's OOM killer, an operator."""

log = structlog.get_logger(__name__)


class _DrainOver(Exception):
    """There is no more time to record what a stopped engine had reported."""


class EngineSupervisor:
    """Runs the processes of one attempt, one after the other.

    check: raises the reason why the attempt must stop. memory_limit: bytes past which a process is ended.
    facts: what was seen of the processes so far.
    """

    def __init__(
        self,
        recorder: EngineRecorder,
        telemetry: AttemptTelemetry,
        check: Check,
        memory_limit: int | None,
    ) -> None:
        self._recorder = recorder
        self._telemetry = telemetry
        self._check = check
        self._memory_limit = memory_limit
        self._unrecorded: Message | None = None  # the message whose recording a stop interrupted
        self._has_solved = False  # whether a layer was finished in this attempt
        self.facts = AttemptFacts()

    def run(self, engine: EngineProcess) -> dict[str, Any]:
        """Follow a process to its end. Returns the data of its last message, `succeeded`.

        Raises:
            AttemptFailed: it failed, crashed, took too much memory, or said what is no message.
            CancelRequested, ShuttingDown, LeaseLost: of `check`. The process has ended by then.
        """
        try:
            return self._follow(engine)
        except (CancelRequested, ShuttingDown, AttemptFailed):
            engine.terminate()
            self._drain(engine)
            raise
        finally:
            engine.kill()

    def _follow(self, engine: EngineProcess) -> dict[str, Any]:
        while True:
            self._check_engine(engine)
            try:
                message = self._next_message(engine, _POLL_SECONDS)
            except EOFError:
                raise self._crash(engine) from None
            except BadMessage as error:
                raise AttemptFailed(
                    AttemptOutcome.FAILED,
                    "engine_error",
                    f"The engine wrote a line that is no message: {error}. {REPORT_HINT}",
                ) from error
            if message is None:
                continue
            if message["type"] in TERMINAL:
                engine.finish(self._check)
                return self._result(message)
            self._unrecorded = message
            self._record(message, lambda: self._check_engine(engine))
            self._unrecorded = None

    def _record(self, message: Message, check: Check) -> None:
        self._recorder.record(message, check)
        self._has_solved = self._has_solved or message["type"] == "layer_solved"

    def _drain(self, engine: EngineProcess) -> None:
        """Record what a stopped engine had reported before it stopped, so that no later attempt solves it
        again; as far as the store takes it at once."""
        deadline = time.monotonic() + _DRAIN_SECONDS

        def check() -> None:
            if time.monotonic() > deadline:
                raise _DrainOver

        try:
            if self._unrecorded is not None:
                self._record(self._unrecorded, check)
            while (message := self._next_message(engine, 0)) is not None:
                if message["type"] not in TERMINAL:
                    self._record(message, check)
        except (EOFError, BadMessage, _DrainOver, StoreError):
            return

    def _next_message(self, engine: EngineProcess, seconds: float) -> Message | None:
        message = engine.next_message(seconds)
        if message is not None:
            self._telemetry.on_message(message)
        return message

    def _check_engine(self, engine: EngineProcess) -> None:
        """Raise the reason why the process must stop now, its memory included."""
        self._check()
        engine.relay_log()
        resident = engine.resident_bytes()
        self.facts = dataclasses.replace(self.facts, peak_host_bytes=engine.peak_host_bytes)
        if self._memory_limit is not None and resident > self._memory_limit:
            raise AttemptFailed(
                AttemptOutcome.OUT_OF_MEMORY,
                "memory_limit",
                f"The engine used {resident} bytes of memory; this worker allows {self._memory_limit}. "
                "Use fewer or shorter calibration samples, or a worker with more memory.",
            )

    def _crash(self, engine: EngineProcess) -> AttemptFailed:
        """What a process means that ended without a last message.

        It is retried where somebody killed it. Where it ended itself, the next attempt would do the same:
        at once if it exited; after a fault in native code, unless this attempt finished a layer.
        """
        code = engine.finish(self._check)
        tail = engine.log_tail()
        log.error("engine_crashed", exit_code=code, log_tail=tail)
        if code >= 0:
            last_line = (tail.strip().splitlines() or ["nothing"])[-1]
            how = f"ended with exit code {code} and no last message. Its log ends with: {last_line}"
            return _crashed(how, retryable=False)
        number = signal.Signals(-code)
        self.facts = dataclasses.replace(self.facts, exit_signal=-code)
        how = f"was killed by {number.name}"
        if number in _FAULTS:
            return _crashed(f"{how}, a fault in native code", retryable=self._has_solved)
        if number == signal.SIGKILL:
            how += " (often the kernel, out of memory)"
        return _crashed(how, retryable=True)

    def _result(self, message: Message) -> dict[str, Any]:
        """The data of the last message, if that is `succeeded`."""
        data: dict[str, Any] = message["data"]
        self.facts = dataclasses.replace(
            self.facts,
            peak_host_bytes=data["peak_host_bytes"],
            peak_gpu_bytes=data.get("report", {}).get("peak_gpu_bytes"),
        )
        if message["type"] == "succeeded":
            return data
        is_memory = data["code"] == "out_of_memory"
        raise AttemptFailed(
            AttemptOutcome.OUT_OF_MEMORY if is_memory else AttemptOutcome.FAILED,
            data["code"],
            f"{data['message']} {data['hint']}".strip(),
            retryable=data["code"] in _RETRYABLE_CODES,
        )


def _crashed(how: str, *, retryable: bool) -> AttemptFailed:
    hint = "" if retryable else f" {REPORT_HINT}"
    return AttemptFailed(
        AttemptOutcome.CRASHED, "engine_crashed", f"The engine process {how}.{hint}", retryable=retryable
    )
