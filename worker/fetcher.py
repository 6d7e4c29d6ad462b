"""The fetching process: `python -m worker.fetcher SPEC.json`, with the protocol of worker.runner.

It puts a job's model and text from the Hub or S3 into the cache under HF_HOME, where the engine finds them.
It has the network and the credentials; the engine, which works on the files of strangers, has neither. It
imports no torch.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from compression.events import OnEvent
from worker.runner import EngineSpec, main


def fetch(spec: EngineSpec, on_event: OnEvent) -> dict[str, Any]:
    """Fetch what is not in the cache. {"dataset"}: pinned, where the job did not say which state it means."""
    from compression.data import sources  # when `run` looks: a broken installation is a reason too

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that half a file is removed
    found = sources.fetch(spec.source, spec.dataset, spec.calibration, spec.evaluation, on_event)
    return {"dataset": found.pinned and found.pinned.model_dump(mode="json")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], fetch))
