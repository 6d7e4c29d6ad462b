"""The two sides: the API on one core; PostgreSQL, the client and everything else on the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

import migrations
from api.database import Database
from tests.support.postgres import PostgresServer

START_SECONDS = 30


@dataclass(frozen=True)
class Api:
    """The server's process, and who asks it."""

    process: int
    port: int
    key: str
    project: str
    database: Database
    root: Path

    def threads(self) -> int:
        """How many threads the process has."""
        return int(self._status("Threads"))

    def resident_bytes(self) -> int:
        return int(self._status("VmRSS").split()[0]) * 1024

    def cpu_seconds(self) -> float:
        """What the process has had of its core."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, name: str) -> str:
        lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


@contextmanager
def running(folder: Path) -> Iterator[Api]:
    """A migrated PostgreSQL with its own settings, durable, and an API on it."""
    with _on_one_core() as servers:  # PostgreSQL and everything else inherit it
        (folder / "postgres").mkdir()
        postgres = PostgresServer(folder / "postgres")
        postgres.start()
        try:
            with _api(folder, postgres.url(), servers) as api:
                yield api
        finally:
            postgres.stop()


@contextmanager
def running_on_sqlite(folder: Path) -> Iterator[Api]:
    """An API on a new SQLite file."""
    with _on_one_core() as servers, _api(folder, f"sqlite:///{folder / 'bitmill.db'}", servers) as api:
        yield api


@contextmanager
def _on_one_core() -> Iterator[int]:
    """Keep this process on the first of its cores, and hand over the second."""
    before = os.sched_getaffinity(0)
    own, other = sorted(before)[:2]
    os.sched_setaffinity(0, {own})
    try:
        yield other
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _api(folder: Path, url: str, core: int) -> Iterator[Api]:
    """A server on that database, and the first key."""
    (folder / "models").mkdir()
    migrations.upgrade(url)
    with _process(folder, url, core) as (process, port):
        key = json.loads((folder / "data" / "credentials.json").read_text())["api_key"]
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/project", headers={"Authorization": f"Bearer {key}"})
        database = Database(url)
        yield Api(process, port, key, answer.json()["id"], database, folder / "models")
        database.close()


@contextmanager
def _process(folder: Path, url: str, core: int) -> Iterator[tuple[int, int]]:
    """The process and the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    environment = {
        "BITMILL_DATA_DIR": str(folder / "data"),
        "BITMILL_DATABASE_URL": url,
        "BITMILL_LOCAL_ROOTS": str(folder / "models"),
    }
    with (folder / "api.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load.server", str(core), str(port)],
            env=os.environ | environment,
            stderr=log,
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError((folder / "api.log").read_text(errors="replace")[-4000:])
            time.sleep(0.1)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    except httpx.TransportError:
        return False
