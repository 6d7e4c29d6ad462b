"""The engine's process: how it fails, and that it never outlives its supervisor or learns its secrets."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression.errors import NumericalError
from compression.recipe import Recipe
from worker.engine import RUNNER, engine_environment
from worker.runner import EngineSpec, explain


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The runner with a specification whose source is not a checkpoint."""
    recipe = Recipe.from_short("W8A8", has_dataset=False)
    spec = EngineSpec(source=tmp_path, recipe=recipe, output_dir=tmp_path / "output")
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    process = subprocess.Popen(
        [*RUNNER, str(tmp_path / "spec.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=engine_environment(tmp_path),
        start_new_session=True,
    )
    with process:
        yield process
        process.kill()


def exit_code(process: subprocess.Popen[bytes], within: float) -> int:
    return process.wait(timeout=within)


def test_a_failure_is_the_last_message_with_code_and_peak_memory(runner: subprocess.Popen[bytes]) -> None:
    assert runner.stdout is not None
    *events, last = [json.loads(line) for line in runner.stdout]
    assert [event["type"] for event in events] == ["phase_changed"]
    assert last["type"] == "failed"
    assert last["data"]["code"] == "config_missing"
    assert last["data"]["peak_host_bytes"] > 100 << 20
    assert exit_code(runner, 30) == 1


def test_the_end_of_the_control_pipe_ends_it(runner: subprocess.Popen[bytes]) -> None:
    time.sleep(0.5)
    assert runner.stdin is not None
    runner.stdin.close()
    assert exit_code(runner, 5) == -signal.SIGKILL


def test_sigterm_ends_it_at_once(runner: subprocess.Popen[bytes]) -> None:
    time.sleep(0.5)
    runner.terminate()
    assert exit_code(runner, 1) == -signal.SIGTERM


def test_its_environment_has_no_secret(tmp_path: Path) -> None:
    secrets = {
        "BITMILL_DATABASE_URL": "postgresql://user:password@host/db",
        "BITMILL_SECRET_KEY": "secret",
        "BITMILL_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_TOKEN": "secret",
    }
    given = {"PATH": os.defpath, "CUDA_VISIBLE_DEVICES": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", **secrets}
    environment = engine_environment(tmp_path, given)
    assert environment["PATH"] == os.defpath
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment["TMPDIR"] == str(tmp_path)
    assert not environment.keys() & secrets.keys()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericalError("non_finite_weights", "NaN in lm_head."), "non_finite_weights"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
        (OSError(errno.EFBIG, "File too large"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "engine_error"),
        (ZeroDivisionError("division by zero"), "engine_error"),
    ],
)
def test_every_error_has_a_code(error: Exception, code: str) -> None:
    told = explain(error)
    assert told["code"] == code
    if code == "engine_error":
        assert told["message"].startswith(f"{type(error).__name__}: ")
