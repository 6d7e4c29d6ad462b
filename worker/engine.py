"""The supervisor's handle on an engine or fetching process: start it, hear it, watch its memory, end it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from api.store.base import Check, go_on
from compression.hub.environment import CACHE_VARIABLES
from worker.runner import EngineSpec

RUNNER = (sys.executable, "-P", "-m", "worker.runner")  # -P: nothing is imported from the scratch folder
FETCHER = (sys.executable, "-P", "-m", "worker.fetcher")
CANCEL_GRACE_SECONDS = 1.5  # an engine that is deaf is killed: what it finished is journaled
EXIT_GRACE_SECONDS = 10.0  # between the last message and the end of the process: torch tears down slowly
_LINE_BYTES = 4096  # of one log record; what is longer becomes several

PASSED_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
    *CACHE_VARIABLES,
)  # fmt: skip
NETWORK_VARIABLES = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip

log = structlog.get_logger(__name__)


def engine_environment(scratch: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The engine's whole environment: where to find Python, libraries and devices, and nothing secret.

    It never writes .pyc files: on a full disk they come out truncated, and every later start would fail.
    """
    passed = {name: environment[name] for name in PASSED_VARIABLES if name in environment}
    own = {"TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**passed, **own}


def fetcher_environment(
    scratch: Path, environment: Mapping[str, str] = os.environ, *, s3: bool = False
) -> dict[str, str]:
    """The fetching process's whole environment: the engine's, the network, the Hub with its token, and for a
    job that has something in S3 what AWS libraries read."""
    prefixes = ("HF_", "AWS_") if s3 else ("HF_",)
    network = {
        name: value
        for name, value in environment.items()
        if name.startswith(prefixes) or name.upper() in NETWORK_VARIABLES
    }
    offline = {"HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE", "0")}
    return {**engine_environment(scratch, environment), **network, **offline}


class EngineProcess:
    """One running engine, leader of its own process group.

    Create it in a thread that outlives it: the kernel kills the engine when that thread ends.
    """

    def __init__(
        self, spec: EngineSpec, scratch: Path, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        specification = scratch / "spec.json"
        specification.write_text(spec.model_dump_json())
        self._log_path = scratch / "engine.log"
        with self._log_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*command, str(specification)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=scratch,
                env=environment,
                start_new_session=True,
            )
        self._log = self._log_path.open("rb")
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-messages", daemon=True)
        self._reader.start()
        self._peak_host_bytes = 0
        self._exited = False

    def next_message(self, timeout: float) -> dict[str, Any] | None:
        """The next message, None if none came within `timeout` seconds; EOFError when there are no more."""
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            self._messages.put(None)
            raise EOFError("the engine closed its messages")
        return message

    def resident_bytes(self) -> int:
        """Resident memory now, in bytes; 0 once the process is gone."""
        fields = self._memory_fields()
        self._peak_host_bytes = max(self._peak_host_bytes, fields.get("VmHWM", 0))
        return fields.get("VmRSS", 0)

    @property
    def peak_host_bytes(self) -> int:
        """The most resident memory seen by `resident_bytes`, in bytes."""
        return self._peak_host_bytes

    def log_tail(self, size: int = 4096) -> str:
        """The end of what the engine wrote to stderr."""
        with self._log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace")

    def relay_log(self) -> None:
        """Log what the process has written to stderr since the last call, a record for each line."""
        while line := self._log.readline(_LINE_BYTES):
            if not (line.endswith(b"\n") or len(line) == _LINE_BYTES or self._exited):
                self._log.seek(-len(line), os.SEEK_CUR)  # the rest of it is still to come
                return
            text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
            if text:
                log.info("engine_output", line=text)

    def terminate(self) -> None:
        """Cancel: SIGTERM to the group, SIGKILL after a grace. Returns when none of the group is left."""
        self._signal_group(signal.SIGTERM)
        self._await_exit(CANCEL_GRACE_SECONDS, go_on)
        self._reap()

    def kill(self) -> None:
        """SIGKILL to the group, now."""
        self._reap()

    def finish(self, check: Check = go_on) -> int:
        """Wait for an engine that has no more messages. Returns its exit code, or minus a signal's number.

        check: whatever it raises ends the wait, and leaves the engine as it is.
        """
        self._await_exit(EXIT_GRACE_SECONDS, check)
        return self._reap()

    def _reap(self) -> int:
        """Kill what is left of the group while its leader still holds the id, then collect the leader."""
        self._signal_group(signal.SIGKILL)
        code = self._process.wait()
        self._exited = True
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if not self._log.closed:
            self.relay_log()
            self._log.close()
        return code

    def _signal_group(self, number: int) -> None:
        if not self._exited:
            os.killpg(self._process.pid, number)

    def _await_exit(self, seconds: float, check: Check) -> None:
        """Wait for the leader without collecting it, so that the group's id stays its own."""
        deadline = time.monotonic() + seconds
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while (
            not self._exited
            and os.waitid(os.P_PID, self._process.pid, options) is None
            and time.monotonic() < deadline
        ):
            check()
            time.sleep(0.02)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # a killed engine may leave a torn last line
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _memory_fields(self) -> dict[str, int]:
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return {}
        lines = (line.partition(":") for line in status.splitlines() if line.startswith(("VmHWM", "VmRSS")))
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines}
