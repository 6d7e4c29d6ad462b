"""A `bitmill serve` of the demo's own, as a person would start it: a process, found by what it prints."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.client import Client
from worker.runner import PR_SET_PDEATHSIG

STOP_SECONDS = 30
_LOG_LINES = 15


class ServerFailed(Exception):
    """The server ended before it was ready; the message has the end of its log."""


def _end_with_parent() -> None:
    """Runs in the server's process: the kernel sends it SIGTERM when the demo is gone, killed or not."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextmanager
def serving(data_dir: Path, local_root: Path, log: Path) -> Iterator[Client]:
    """A client of a server on a free port. It ends with the block, and with this process however that ends.

    Settings of the person's own environment do not reach it.

    Raises:
        ServerFailed: it did not start.
    """
    command = [sys.executable, "-m", "cli", "serve", "--json", "--port", "0"]
    command += ["--data-dir", str(data_dir), "--local-root", str(local_root)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("BITMILL_")}
    with (
        log.open("w") as log_file,
        subprocess.Popen(
            command,
            env=own,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            preexec_fn=_end_with_parent,
        ) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith('{"url"'):
                server.wait(STOP_SECONDS)
                end = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
                raise ServerFailed(f"bitmill serve ended with {server.returncode}. {line}{end}")
            ready = json.loads(line)
            credentials = json.loads(Path(ready["credentials_file"]).read_text())
            with Client(ready["url"], credentials["api_key"]) as client:
                yield client
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
