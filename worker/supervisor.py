"""Runs an attempt's processes, first what fetches and then the engine, and says what their end means."""

from __future__ import annotations

import dataclasses
import signal
import time
from typing import Any

import structlog

from api.jobs.ledger.models import AttemptOutcome
from api.jobs.queue.attempts import AttemptFacts
from api.store.base import Check, StoreError
from worker.context import ShuttingDown
from worker.engine import WorkProcess
from worker.heartbeat import CancelRequested
from worker.host import HostFault
from worker.messages import TERMINAL, BadMessage, Message
from worker.outcomes import AttemptFailed
from worker.recorder import EngineRecorder
from worker.runner import INSTALLATION_BROKEN, REPORT_HINT
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


class Supervisor:
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

    def run(self, process: WorkProcess) -> dict[str, Any]:
        """Follow a process to its end. Returns the data of its last message, `succeeded`.

        Raises:
            AttemptFailed: it failed, crashed, took too much memory, or said what is no message.
            HostFault: it cannot be run on this host.
            CancelRequested, ShuttingDown, LeaseLost: of `check`. The process has ended by then.
        """
        try:
            return self._follow(process)
        except (CancelRequested, ShuttingDown, AttemptFailed):
            process.terminate()
            self._drain(process)
            raise
        finally:
            process.kill()

    def _follow(self, process: WorkProcess) -> dict[str, Any]:
        while True:
            self._check_process(process)
            try:
                message = self._next_message(process, _POLL_SECONDS)
            except EOFError:
                raise self._crash(process) from None
            except BadMessage as error:
                raise AttemptFailed(
                    AttemptOutcome.FAILED,
                    "engine_error",
                    f"The {process.name} wrote a line that is no message: {error}. {REPORT_HINT}",
                ) from error
            if message is None:
                continue
            if message["type"] in TERMINAL:
                process.finish(self._check)
                return self._result(message)
            self._unrecorded = message
            self._record(message, lambda: self._check_process(process))
            self._unrecorded = None

    def _record(self, message: Message, check: Check) -> None:
        self._recorder.record(message, check)
        self._has_solved = self._has_solved or message["type"] == "layer_solved"

    def _drain(self, process: WorkProcess) -> None:
        """Record what a stopped engine had reported before it stopped, so that no later attempt solves it
        again; as far as the store takes it at once."""
        deadline = time.monotonic() + _DRAIN_SECONDS

        def check() -> None:
            if time.monotonic() > deadline:
                raise _DrainOver

        try:
            if self._unrecorded is not None:
                self._record(self._unrecorded, check)
            while (message := self._next_message(process, 0)) is not None:
                if message["type"] not in TERMINAL:
                    self._record(message, check)
        except (EOFError, BadMessage, _DrainOver, StoreError):
            return

    def _next_message(self, process: WorkProcess, seconds: float) -> Message | None:
        message = process.next_message(seconds)
        if message is not None:
            self._telemetry.on_message(message)
        return message

    def _check_process(self, process: WorkProcess) -> None:
        """Raise the reason why the process must stop now, its memory included."""
        self._check()
        process.relay_log()
        resident = process.resident_bytes()
        self.facts = dataclasses.replace(self.facts, peak_host_bytes=process.peak_host_bytes)
        if self._memory_limit is not None and resident > self._memory_limit:
            raise AttemptFailed(
                AttemptOutcome.OUT_OF_MEMORY,
                "memory_limit",
                f"The {process.name} used {resident} bytes of memory; "
                f"this worker allows {self._memory_limit}. "
                "Use fewer or shorter calibration samples, or a worker with more memory.",
            )

    def _crash(self, process: WorkProcess) -> AttemptFailed | HostFault:
        """What a process means that ended without a last message.

        It is retried where somebody killed it. Where it ended itself, the host is to blame before its first
        message, as the job was not begun: an import that fails, an installation for another processor. After
        it the next attempt would do the same, unless this one finished a layer.
        """
        code = process.finish(self._check)
        tail = process.log_tail()
        log.error("process_crashed", process=process.name, exit_code=code, log_tail=tail)
        if code < 0:
            self.facts = dataclasses.replace(self.facts, exit_signal=-code)
        if code < 0 and -code not in _FAULTS:
            how = f"was killed by {_signal_name(-code)}"
            if -code == signal.SIGKILL:
                how += " (often the kernel, out of memory)"
            return _crashed(process, how, retryable=True)
        if code < 0:
            how = f"was killed by {_signal_name(-code)}, a fault in native code"
        else:
            last_line = (tail.strip().splitlines() or ["nothing"])[-1]
            how = f"ended with exit code {code} and no last message. Its log ends with: {last_line}"
        if not process.has_spoken:
            return HostFault(f"The {process.name} did not begin: it {how}")
        return _crashed(process, how, retryable=self._has_solved)

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
        if data["code"] == INSTALLATION_BROKEN:
            raise HostFault(data["message"])
        is_memory = data["code"] == "out_of_memory"
        raise AttemptFailed(
            AttemptOutcome.OUT_OF_MEMORY if is_memory else AttemptOutcome.FAILED,
            data["code"],
            f"{data['message']} {data['hint']}".strip(),
            retryable=data["code"] in _RETRYABLE_CODES,
        )


def _signal_name(number: int) -> str:
    """SIGKILL, or the number of one without a name: most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _crashed(process: WorkProcess, how: str, *, retryable: bool) -> AttemptFailed:
    hint = "" if retryable else f" {REPORT_HINT}"
    return AttemptFailed(
        AttemptOutcome.CRASHED, "engine_crashed", f"The {process.name} {how}.{hint}", retryable=retryable
    )
