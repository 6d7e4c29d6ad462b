"""How long a submission takes to be answered whose work was done before.

    python -m benchmarks.same_work

`bitmill serve` runs as its users run it, on SQLite and a local folder; a tiny model is compressed once, then
the same request is sent 200 times.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from api.client.types import JobSubmit
from benchmarks.console import say
from tests.integration.service import Service
from tests.support.models import tiny_dataset, tiny_model

REQUESTS = 200


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "models")
        body: dict[str, Any] = {
            "model": str(tiny_model(root / "tiny")),
            "dataset": str(tiny_dataset(root / "texts.jsonl")),
        }
        body |= {"scheme": "W4A16", "calibration": {"num_calibration_samples": 4, "max_seq_length": 64}}
        service = Service(Path(scratch), root)
        try:
            service.start()
            service.succeed(service.submit(**body))
            again = service.client.submit(cast("JobSubmit", body))  # the files were too new to be remembered
            service.succeed(again["id"])
            seconds = []
            for _ in range(REQUESTS):
                started = time.perf_counter()
                job = service.client.submit(cast("JobSubmit", body))
                seconds.append(time.perf_counter() - started)
                assert (job["status"], job["deduplicated_from"] is None) == ("succeeded", False), job
        finally:
            service.close()
    seconds = sorted(1e3 * each for each in seconds)
    median, p99 = statistics.median(seconds), seconds[int(0.99 * REQUESTS)]
    say(f"{REQUESTS} requests: median {median:.1f} ms, p99 {p99:.1f} ms, slowest {seconds[-1]:.1f} ms")


if __name__ == "__main__":
    main()
