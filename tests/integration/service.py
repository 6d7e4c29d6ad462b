"""The real service as its users run it: `bitmill serve` and `bitmill worker` in processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import httpx

from api.client import ApiError, Client
from api.client.types import EventRead, JobDetail, JobSubmit

START_SECONDS = 60
JOB_SECONDS = 120


class Process:
    """A command of `bitmill` on one core, with nothing of this process's environment but PATH.

    variables: those of others than Bitmill, such as AWS's.
    """

    def __init__(
        self,
        command: str,
        folder: Path,
        settings: Mapping[str, str],
        core: int = 0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            **{f"BITMILL_{name}": value for name, value in settings.items()},
            **variables,
        }
        self.log = folder / f"{command}.log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cli", command], env=environment, stdout=log, stderr=log
            )
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(self._process.pid, {cores[core % len(cores)]})

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, to this process alone."""
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit code of a process that is about to end."""
        return self._process.wait(timeout=30)

    def end(self) -> None:
        """Whatever it takes, for the end of a test."""
        if self.is_running():
            self.kill()


class Service:
    """An API on a free port, its data folder, and a client with its first key.

    variables: of its processes, besides the settings.
    """

    def __init__(
        self,
        folder: Path,
        roots: Path,
        variables: Mapping[str, str] = MappingProxyType({}),
        **settings: str,
    ) -> None:
        self.data = folder / "data"
        self.folder = folder
        self.port = free_port()
        self.settings = {
            "DATA_DIR": str(self.data),
            "PORT": str(self.port),
            "LOCAL_ROOTS": str(roots),
            "DEVICE": "cpu",
            **settings,
        }
        self.variables = variables
        self.serve: Process | None = None
        self._client: Client | None = None

    def start(self) -> Process:
        """Start `bitmill serve` and wait until it is ready."""
        self.serve = Process("serve", self.folder, self.settings, variables=self.variables)
        url = f"http://127.0.0.1:{self.port}"
        eventually(lambda: self._answers(url), START_SECONDS, f"no server; see {self.serve.log}", every=0.1)
        key = json.loads((self.data / "credentials.json").read_text())["api_key"]
        self._close_client()
        self._client = Client(url, key, timeout_seconds=30)
        return self.serve

    def worker(
        self, core: int, variables: Mapping[str, str] = MappingProxyType({}), **settings: str
    ) -> Process:
        """Start `bitmill worker` on the same settings, but for these."""
        return Process(
            "worker", self.folder, {**self.settings, **settings}, core, {**self.variables, **variables}
        )

    def close(self) -> None:
        self._close_client()
        if self.serve is not None:
            self.serve.end()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()

    @property
    def client(self) -> Client:
        """Of the server, with its first key."""
        assert self._client is not None, "the service was not started"
        return self._client

    def submit(self, **body: Any) -> str:
        """Submit a job that is run, whatever others have made of the same."""
        return self.client.submit(cast("JobSubmit", {"cache": "bypass", **body}))["id"]

    def job(self, job_id: str) -> JobDetail:
        return self.client.job(job_id)

    def wait(self, job_id: str, seconds: float = JOB_SECONDS) -> JobDetail:
        """The job once it has ended."""
        return self.client.wait(job_id, timeout_seconds=seconds)

    def has_artifacts(self, job_id: str) -> bool:
        """Whether anything of the job is published."""
        try:
            return bool(self.client.artifacts(job_id)["files"])
        except ApiError as error:
            if error.code != "artifacts_not_available":
                raise
            return False

    def succeed(self, job_id: str) -> None:
        """Wait for the job, which must succeed."""
        job = self.wait(job_id)
        assert (job["status"], job["error"]) == ("succeeded", None)

    def wait_for_layers(self, job_id: str, count: int) -> None:
        """Until so many layers are finished, with the job still running."""

        def enough() -> bool:
            job = self.job(job_id)
            assert job["status"] in ("queued", "running"), job
            return bool(job["layers_done"] >= count)

        eventually(enough, JOB_SECONDS, f"{job_id} finished no {count} layers", every=0.1)

    def events(self, job_id: str) -> list[EventRead]:
        """All events so far; their seq has no gap."""
        found = list(self.client.events(job_id))
        assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
        return found

    def layers(self, job_id: str, type: str, attempt: int) -> list[int]:
        """The layers that an attempt's events of that type named, in their order."""
        events = [event for event in self.events(job_id) if event["attempt"] == attempt]
        return [event["data"]["layer"] for event in events if event["type"] == type]

    def outcomes(self, job_id: str) -> list[str | None]:
        return [attempt["outcome"] for attempt in self.job(job_id)["attempts"]]

    def download(self, job_id: str) -> dict[str, str]:
        """Download every file of a job. Their sha256 by name, which the manifest has too."""
        digests = {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            for listed in self.client.artifacts(job_id)["files"]:
                self.client.download(job_id, listed["name"], file)
                content = file.read_bytes()
                digests[listed["name"]] = hashlib.sha256(content).hexdigest()
                assert digests[listed["name"]] == listed["sha256"]
                assert len(content) == listed["size"]
                file.unlink()
        return digests

    def weights(self, job_id: str) -> dict[str, str]:
        """sha256 of the safetensors files of a job."""
        return {
            name: digest for name, digest in self.download(job_id).items() if name.endswith(".safetensors")
        }

    def engines(self) -> list[int]:
        """Process ids of the engines that work for this data folder."""
        return [
            pid for pid, command in commands() if "worker.runner" in command and str(self.data) in command
        ]

    def engine(self) -> int:
        """The process id of the running engine, as soon as there is one."""
        eventually(lambda: bool(self.engines()), JOB_SECONDS, "no engine started")
        return self.engines()[0]

    def scratch(self) -> list[str]:
        """What attempts have left in the scratch folders."""
        folder = self.data / "scratch"
        return [path.name for path in folder.glob("*/*") if path.name != ".lock"]

    def _answers(self, url: str) -> bool:
        assert self.serve is not None
        assert self.serve.is_running(), self.serve.log.read_text()
        with Client(url, retry_seconds=0) as client, contextlib.suppress(ApiError, httpx.TransportError):
            return client.ready()["status"] == "ready"
        return False


def eventually(condition: Callable[[], bool], seconds: float, complaint: str, every: float = 0.02) -> None:
    """Wait until the condition holds, which is looked at `every` so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(every)


def commands() -> Iterator[tuple[int, str]]:
    """All processes of this machine that are not zombies: id and command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command:
                    yield int(folder.name), command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
