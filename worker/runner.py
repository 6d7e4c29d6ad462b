"""The engine's own process: `python -m worker.runner SPEC.json`.

    stdin   control pipe: nothing is written to it. It closes when the supervisor is gone; so this ends
    stdout  one JSON line for every event, and last {"type": "succeeded" | "failed", "data": {...}}
    stderr  the log, and whatever a library prints

SIGTERM ends it at once: what is finished is on disk, journaled and reported, the rest is dropped. It holds no
secret of the service: its environment is made by worker.engine, and the specification has only local paths.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from compression.boundary import unexpected
from compression.errors import CompressionError, ResourceError
from compression.events import Event, OnEvent
from compression.planning.memory import ACTIVATION_BUDGET_BYTES
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
INSTALLATION_BROKEN = "installation_broken"
MESSAGE_CHARACTERS = 2000
"""Of what an unexpected exception says: some quote the whole input."""
REPORT_HINT = "This is a fault of Bitmill. Report it with the worker's log of this attempt."


class Terminated(BaseException):
    """SIGTERM came, in a process that has to clean up before it ends."""


class EngineSpec(BaseModel):
    """One compression.

    source: a checkpoint folder; a name on the Hub at a commit, as `dataset.hub` is; or a folder in S3 at a
    revision. worker.fetcher puts what is on the Hub or in S3 into the cache first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | Path
    recipe: Recipe
    dataset: DatasetSpec | None = None
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    device: str = "auto"
    activation_budget_bytes: int = ACTIVATION_BUDGET_BYTES
    output_dir: Path


Work = Callable[[EngineSpec, OnEvent], dict[str, Any]]
"""What a process is there for. Returns the data of its last message."""


def main(arguments: list[str], work: Work) -> int:
    """Work on the specification in the file arguments[0]; 0 for a success, 1 for a failure with a reason."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_supervisor(control=sys.stdin.fileno())
    messages = _claim_stdout()
    last = run(Path(arguments[0]), messages, work)
    _write(messages, last)
    return 0 if last["type"] == "succeeded" else 1


def run(specification: Path, messages: IO[str], work: Work) -> dict[str, Any]:
    """Work, writing events as they come. Returns the last message, with this process's peak memory.

    Whatever is raised, also by the specification or by a result that is not JSON, becomes such a message: a
    process without one counts as crashed.
    """

    def forward(event: Event) -> None:
        _write(messages, event.to_dict())

    try:
        spec = EngineSpec.model_validate_json(specification.read_bytes())
        data = {**work(spec, forward), "peak_host_bytes": peak_host_bytes()}
        json.dumps(data)
    except Terminated:
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception, nor is its sys.exit()
        sys.excepthook(type(error), error, error.__traceback__)
        return {"type": "failed", "data": {**explain(error), "peak_host_bytes": peak_host_bytes()}}
    return {"type": "succeeded", "data": data}


def compress(spec: EngineSpec, on_event: OnEvent) -> dict[str, Any]:
    """The engine's work: {"report"}."""
    with importing("engine"):
        from compression import compress as run_engine

    report = run_engine(
        spec.source,
        spec.recipe,
        spec.output_dir,
        dataset=spec.dataset,
        calibration=spec.calibration,
        evaluation=spec.evaluation,
        device=spec.device,
        activation_budget_bytes=spec.activation_budget_bytes,
        on_event=on_event,
    )
    return {"report": report.to_dict()}


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Around the imports of the work itself: a process that cannot even do that is no fault of the job.

    Raises:
        ResourceError: `installation_broken`.
    """
    try:
        yield
    except Exception as error:
        message = f"The {what} cannot be imported: {type(error).__name__}: {error}"[:MESSAGE_CHARACTERS]
        raise ResourceError(INSTALLATION_BROKEN, message, "Install Bitmill again on this host.") from error


def explain(error: BaseException) -> dict[str, str]:
    """{"code", "message", "hint"} of whatever the engine raised."""
    known = error if isinstance(error, CompressionError) else unexpected(error)
    return {"code": known.code, "message": known.message, "hint": known.hint}


def peak_host_bytes() -> int:
    """VmHWM: the most resident memory this process ever had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the engine runs on Linux only.")


def die_with_supervisor(control: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, or when `control` closes.

    The pipe covers what the signal cannot: a supervisor that died before this call, and children that the
    engine started, since the whole process group is killed.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "prctl(PR_SET_PDEATHSIG)")

    def watch() -> None:
        while os.read(control, 4096):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="control-pipe", daemon=True).start()


def _claim_stdout() -> IO[str]:
    """Keep stdout for messages, and send what libraries print there to stderr."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages


def _write(messages: IO[str], message: dict[str, Any]) -> None:
    messages.write(json.dumps(message, separators=(",", ":")) + "\n")
    messages.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], compress))
