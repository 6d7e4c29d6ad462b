"""An engine or fetching process, as its supervisor handles it: start, read messages, watch memory, end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from api.private import UMASK, opener
from api.store.base import Check, go_on
from compression.hub.environment import CACHE_VARIABLES
from compression.machine.environment import KERNEL_VARIABLES
from worker.host import needed_of_host
from worker.messages import BadMessage, Message, parse
from worker.runner import EngineSpec

RUNNER = (sys.executable, "-P", "-m", "worker.runner")  # -P: nothing is imported from the scratch folder
FETCHER = (sys.executable, "-P", "-m", "worker.fetcher")
CANCEL_GRACE_SECONDS = 1.5
"""Between SIGTERM and SIGKILL: a cancel has to take effect within 5 seconds (docs/adr/0028)."""
EXIT_GRACE_SECONDS = 10.0
"""Between the last message and the end of the process: torch tears down slowly."""
_LOG_RECORD_BYTES = 4096
"""A longer line of the process's log becomes several records."""

PASSED_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
    *KERNEL_VARIABLES, *CACHE_VARIABLES,
)  # fmt: skip
NETWORK_VARIABLES = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip

log = structlog.get_logger(__name__)


def engine_environment(scratch: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The engine's whole environment: where Python, libraries and devices are, and nothing secret.

    It writes no .pyc files: on a full disk they are truncated, and every later start fails.
    """
    passed = {name: environment[name] for name in PASSED_VARIABLES if name in environment}
    own = {"TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**passed, **own}


def fetcher_environment(
    scratch: Path, environment: Mapping[str, str] = os.environ, *, s3: bool = False
) -> dict[str, str]:
    """The fetching process's whole environment: the engine's, the network's, and the Hub's with its token.

    s3: also what AWS libraries read, for a job that has something in S3.
    """
    prefixes = ("HF_", "AWS_") if s3 else ("HF_",)
    network = {
        name: value
        for name, value in environment.items()
        if name.startswith(prefixes) or name.upper() in NETWORK_VARIABLES
    }
    offline = {"HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE", "0")}
    return {**engine_environment(scratch, environment), **network, **offline}


def start_engine(spec: EngineSpec, folder: Path) -> WorkProcess:
    """Start an engine in its scratch folder. What it writes is private: the umask is its own."""
    return WorkProcess("engine", spec, folder, RUNNER, engine_environment(folder), umask=UMASK)


def start_fetcher(spec: EngineSpec, folder: Path, *, s3: bool) -> WorkProcess:
    """Start a fetching process. It writes to the Hub's cache, which others may share: its umask is ours."""
    return WorkProcess("fetching process", spec, folder, FETCHER, fetcher_environment(folder, s3=s3))


class WorkProcess:
    """The running engine, or the fetching process; leader of its own process group.

    Create it in a thread that outlives it: the kernel kills the process when that thread ends. It raises
    HostFault where the process cannot be started.
    name: what it is called in messages. umask: of the process; -1: as this one's.
    has_spoken: whether it sent a message. Until then it has done nothing with the job.
    """

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        scratch: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        umask: int = -1,
    ) -> None:
        self.name = name
        self.has_spoken = False
        self._log_path = scratch / "engine.log"
        with needed_of_host("A process cannot be started"):
            specification = scratch / "spec.json"
            with open(specification, "w", encoding="utf-8", opener=opener) as file:
                file.write(spec.model_dump_json())
            with open(self._log_path, "wb", opener=opener) as stderr:
                self._process = subprocess.Popen(
                    [*command, str(specification)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=scratch,
                    env=environment,
                    start_new_session=True,
                    umask=umask,
                )
            self._log = self._log_path.open("rb")
        self._messages: queue.SimpleQueue[Message | BadMessage | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-messages", daemon=True)
        self._reader.start()
        self._peak_host_bytes = 0
        self._exited = False

    def next_message(self, timeout: float) -> Message | None:
        """The next message, or None if none came within `timeout` seconds.

        Raises:
            EOFError: there are no more messages.
            BadMessage: the process wrote a line that is no message.
        """
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            self._messages.put(None)
            raise EOFError(f"the {self.name} closed its messages")
        self.has_spoken = True
        if isinstance(message, BadMessage):
            raise message
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
        """The end of what the process wrote to stderr."""
        with self._log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace")

    def relay_log(self) -> None:
        """Log what the process has written to stderr since the last call, a record for each line."""
        while line := self._log.readline(_LOG_RECORD_BYTES):
            if not (line.endswith(b"\n") or len(line) == _LOG_RECORD_BYTES or self._exited):
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
        """Wait for a process that has no more messages. Returns its exit code, or minus a signal's number.

        check: whatever it raises ends the wait, and leaves the process as it is.
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
        """Read messages until the process closes its end, whatever is in them: a full pipe would stop it."""
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if line.endswith(b"\n"):  # a killed engine may leave a torn last line
                    self._messages.put(_parsed(line))
        finally:
            self._messages.put(None)

    def _memory_fields(self) -> dict[str, int]:
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return {}
        lines = (line.partition(":") for line in status.splitlines() if line.startswith(("VmHWM", "VmRSS")))
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines}


def _parsed(line: bytes) -> Message | BadMessage:
    try:
        return parse(line)
    except BadMessage as error:
        return error
