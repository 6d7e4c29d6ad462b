"""Where a server listens, and how commands on its machine know that it does.

A server that answers at the address of a data folder need not be the one that wrote that address: it may have
ended, and another user's program may have its port. So a server holds a lock for as long as it listens, in
the data folder, which nobody else can open. The kernel drops the lock with the process. Commands send a key
from the data folder only while the lock is held.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from api.private import FILE_MODE, make_folder

_FOLDER = "listening"
_BACKLOG = 2048
"""Connections that wait to be accepted: uvicorn's default."""
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class CannotListen(Exception):
    """The address cannot be listened on. Codes: `port_taken`, `cannot_listen`."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on that address; on a free port if `port` is 0.

    From here on connections are queued, and no other program gets the port.

    Raises:
        CannotListen: another program listens there, or this machine has no such address.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart waits for no old connection
        # Its connections send at once. asyncio sees to that only for sockets that it makes itself, and every
        # answer would take 40 ms longer.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            message = f"Another program listens on port {port} of {host}."
            raise CannotListen("port_taken", message, "End it, or choose another port.") from error
        message = f"Port {port} of {host} cannot be listened on: {error.strerror or error}."
        raise CannotListen("cannot_listen", message, "Look at BITMILL_HOST and BITMILL_PORT.") from error
    return made


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on that address."""
    name = _EVERYWHERE.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextmanager
def announced(data_dir: Path, url: str) -> Iterator[None]:
    """Hold the lock that says that a server of this data folder listens at `url`. The caller does."""
    path = _lock_file(data_dir, url)
    make_folder(path.parent)
    lock = _hold(path)
    try:
        yield
    finally:
        path.unlink()
        os.close(lock)


def is_announced(data_dir: Path, url: str) -> bool:
    """Whether a server of this data folder listens at `url`, one that it wrote down itself."""
    try:
        lock = os.open(_lock_file(data_dir, url), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock_file(data_dir: Path, url: str) -> Path:
    return data_dir / _FOLDER / f"{urlsplit(url).netloc}.lock"


def _hold(path: Path) -> int:
    """A descriptor that holds the lock of the file that has this name: not of one that was just removed.

    Waits for a server that ends, and for commands that look: nobody else can hold it, as the caller has the
    port.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
            return lock
        os.close(lock)
