"""The fetching process: `python -m worker.fetcher SPEC.json`, with the protocol of worker.runner.

It downloads a job's model and text from the Hub or S3 into the cache under HF_HOME, where the engine finds
them. It has the network and the credentials. The engine, which works on the files of strangers, has neither.
It imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from compression.events import OnEvent
from worker.runner import EngineSpec, Terminated, importing, main


def fetch(spec: EngineSpec, on_event: OnEvent) -> dict[str, Any]:
    """Download what is not in the cache.

    Returns {"dataset"}: pinned to the state that was found, where the job named none; else None.
    """
    with importing("fetching process"):
        from compression.data import sources

    signal.signal(signal.SIGTERM, _terminate)
    found = sources.fetch(spec.source, spec.dataset, spec.calibration, spec.evaluation, on_event)
    return {"dataset": found.pinned and found.pinned.model_dump(mode="json")}


def _terminate(_number: int, _frame: object) -> None:
    """Unwind, so that half-written files are removed."""
    raise Terminated


def run() -> int:
    """As `main`. A process that is terminated ends by the signal: its supervisor tells kills from faults."""
    try:
        return main(sys.argv[1:], fetch)
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise


if __name__ == "__main__":
    sys.exit(run())
