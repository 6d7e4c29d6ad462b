"""A compression run that is killed (SIGKILL) at random moments and begun again until it is finished."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.events import JOURNAL_FILE, PARTIAL_SUFFIX
from tests.support.models import tiny_model

RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    "gptq": [{"type": "gptq", "scheme": "W4A16", "group_size": 32}],
    "awq": [{"type": "awq", "scheme": "W4A16_ASYM", "group_size": 32, "n_grid": 3}],
    "smoothquant, gptq": [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}],
    "sparsegpt, gptq": [
        {"type": "sparsegpt", "mask_structure": "2:4"},
        {"type": "gptq", "scheme": "W4A16", "group_size": 32},
    ],
    "wanda": [{"type": "wanda"}],
    "magnitude": [{"type": "magnitude"}],
}
"""One of every method."""

LAYERS = 4

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["compression.pipeline"])


@dataclass(frozen=True)
class Job:
    """What `compress` is called with, but for the output folder."""

    source: Path
    texts: Path
    steps: Sequence[dict[str, Any]]
    calibration: Calibration
    evaluation: Evaluation

    def start(self, output: Path) -> BaseProcess:
        """Begin, or go on, in a process of its own."""
        process = _PROCESSES.Process(target=self.run, args=(output,))
        process.start()
        return process

    def run(self, output: Path) -> None:
        compress(
            self.source,
            Recipe.model_validate(list(self.steps)),
            output,
            dataset=DatasetSpec(path=str(self.texts)),
            calibration=self.calibration,
            evaluation=self.evaluation,
        )


def uninterrupted(job: Job, output: Path) -> float:
    """Run it to its end; the seconds it took."""
    began = time.monotonic()
    process = job.start(output)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def killed(job: Job, output: Path, *, kills: int, seconds: float, seed: int) -> None:
    """Kill the run `kills` times between its beginning and its end, then let it finish.

    Each kill comes at a random moment behind a random layer. seconds: what a run of this job takes. One that
    was finished before its time came is begun anew, from nothing.
    """
    chance, attempts = random.Random(seed), 0
    journal = output.with_name(output.name + PARTIAL_SUFFIX) / JOURNAL_FILE
    while kills:
        attempts += 1
        assert attempts < 100, "the run is always over before it is killed"
        process = job.start(output)
        behind = chance.randrange(_lines(journal), LAYERS + 1)
        while process.exitcode is None and _lines(journal) < behind:
            time.sleep(0.001)
        process.join(chance.uniform(0, seconds / LAYERS))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if output.exists():
            shutil.rmtree(output)
        else:
            kills -= journal.exists()
    uninterrupted(job, output)


def _lines(journal: Path) -> int:
    """The plan and the layers that are finished; at most LAYERS, so that one may still be waited for."""
    try:
        return min(LAYERS, journal.read_bytes().count(b"\n"))
    except FileNotFoundError:  # not begun, or published
        return 0


def compare(folder: Path, texts: Path, steps: list[dict[str, Any]], *, kills: int, seed: int) -> None:
    """Kill one run, and hold its files against those of another."""
    source = tiny_model(folder / "model", layers=LAYERS, hidden=128, intermediate=256, heads=2, kv_heads=1)
    job = Job(
        source,
        texts,
        steps,
        Calibration(num_calibration_samples=8, max_seq_length=64),
        Evaluation(num_samples=4),
    )
    uninterrupted(job, folder / "first")  # the server of processes imports what they need
    seconds = uninterrupted(job, folder / "whole")
    killed(job, folder / "killed", kills=kills, seconds=seconds, seed=seed)
    shards = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    assert shards == sorted(path.name for path in (folder / "killed").glob("*.safetensors"))
    for name in shards:
        assert (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes(), name
