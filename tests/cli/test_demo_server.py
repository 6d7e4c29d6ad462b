"""The demo's server does not outlive the demo: it would hold the data folder against the next one."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.bitmill import environment

DEADLINE_SECONDS = 30
DEMO = """
import sys, time
from pathlib import Path
from cli.demo.server import serving
folder = Path(sys.argv[1])
with serving(folder / "data", folder, folder / "serve.log"):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_demo_leaves_no_server_behind(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tmp_path)],
        env=environment(tmp_path, {"DEVICE": "cpu"}),
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "ready\n"
        lock = tmp_path / "data" / "serve.lock"
        assert _is_held(lock)
        demo.kill()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while _is_held(lock):
        assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
        time.sleep(0.05)


def _is_held(lock: Path) -> bool:
    with lock.open() as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    return True
