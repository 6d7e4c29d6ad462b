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
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

START_SECONDS = 60
JOB_SECONDS = 120
ENDED = ("succeeded", "failed", "cancelled", "expired")


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
            **variables,
            **{f"BITMILL_{name}": value for name, value in settings.items()},
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

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=30)

    def end(self) -> None:
        """Whatever it takes, for the end of a test."""
        if self.is_running():
            self.kill()


class Service:
    """An API on a free port, its data folder, and a client with its first key."""

    def __init__(self, folder: Path, roots: Path, **settings: str) -> None:
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
        self.serve: Process | None = None
        self._client: httpx.Client | None = None

    def start(self) -> Process:
        """Start `bitmill serve` and wait until it is ready."""
        self.serve = Process("serve", self.folder, self.settings)
        url = f"http://127.0.0.1:{self.port}"
        eventually(lambda: self._answers(url), START_SECONDS, f"no server; see {self.serve.log}", every=0.1)
        key = json.loads((self.data / "credentials.json").read_text())["api_key"]
        self._close_client()
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        return self.serve

    def worker(self, core: int) -> Process:
        """Start `bitmill worker` on the same settings."""
        return Process("worker", self.folder, self.settings, core)

    def close(self) -> None:
        self._close_client()
        if self.serve is not None:
            self.serve.end()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()

    def get(self, path: str) -> Any:
        answer = self._http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status_of(self, path: str) -> int:
        return self._http.get(path).status_code

    def post(self, path: str, body: Any = None) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def submit(self, **body: Any) -> str:
        return str(self.post("/v1/jobs", body)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        return found

    def wait(self, job_id: str, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """The job once it has ended."""
        eventually(lambda: self.job(job_id)["status"] in ENDED, seconds, f"{job_id} did not end", every=0.2)
        return self.job(job_id)

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

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """All events so far; their seq has no gap."""
        found: list[dict[str, Any]] = self.get(f"/v1/jobs/{job_id}/events?limit=1000")["items"]
        assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
        return found

    def layers(self, job_id: str, type: str, attempt: int) -> list[int]:
        """The layers that an attempt's events of that type named, in their order."""
        events = [event for event in self.events(job_id) if event["attempt"] == attempt]
        return [event["data"]["layer"] for event in events if event["type"] == type]

    def outcomes(self, job_id: str) -> list[str]:
        return [attempt["outcome"] for attempt in self.job(job_id)["attempts"]]

    def download(self, job_id: str) -> dict[str, str]:
        """Download every file of a job. Their sha256 by name, which the manifest has too."""
        digests = {}
        for file in self.get(f"/v1/jobs/{job_id}/artifacts")["files"]:
            content = self._http.get(file["url"]).content
            digests[file["name"]] = hashlib.sha256(content).hexdigest()
            assert digests[file["name"]] == file["sha256"]
            assert len(content) == file["size"]
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

    @property
    def _http(self) -> httpx.Client:
        assert self._client is not None, "the service was not started"
        return self._client

    def _answers(self, url: str) -> bool:
        assert self.serve is not None
        assert self.serve.is_running(), self.serve.log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/readyz").status_code == 200
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
