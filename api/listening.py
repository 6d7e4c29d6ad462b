"""Where a server listens, and how commands on its machine know that it does.

A server that answers at the address of a data folder need not be the one that wrote that address: it may have
ended, and another user's program may have its port. So a server holds a lock for as long as it listens, in
the data folder, which nobody else can open. The kernel drops the lock with the process. Commands send a key
from the data folder only while the lock is held.

Several hosts and containers may share a data folder, and each has addresses of its own: 127.0.0.1:8080 is
another server in each of them. So the lock's file is named after the network that the address belongs to:
the boot of the machine, and the network namespace of the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from api.private import FILE_MODE, make_folder

FOLDER = "listening"
"""In the data folder: where the locks are."""
_BACKLOG = 2048
"""Connections that wait to be accepted: uvicorn's default."""
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")
_PATIENCE_SECONDS = 5.0
"""How long the lock is waited for. A server that ends, or a command that looks, has it for milliseconds."""
_POLL_SECONDS = 0.02

log = structlog.get_logger(__name__)


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
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name with an empty or too long label
        made.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            message = f"Another program listens on port {port} of {host}."
            raise CannotListen("port_taken", message, "End it, or choose another port.") from error
        message = f"Port {port} of {host} cannot be listened on: {getattr(error, 'strerror', None) or error}."
        raise CannotListen("cannot_listen", message, "Look at BITMILL_HOST and BITMILL_PORT.") from error
    return made


def url_of(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on that address."""
    name = _EVERYWHERE.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextmanager
def announced(data_dir: Path, url: str) -> Iterator[None]:
    """Hold the lock that says that a server of this data folder listens at `url`. The caller does.

    Raises:
        OSError: the lock cannot be had, here or within _PATIENCE_SECONDS (TimeoutError).
    """
    path = _lock_file(data_dir, url)
    make_folder(path.parent)
    _remove_left(path.parent)
    lock = _hold(path)
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # an empty file stays, whose lock is free
            log.warning("lock_file_not_removed", file=str(path), reason=str(error))
        finally:
            os.close(lock)


def is_announced(data_dir: Path, url: str) -> bool:
    """Whether a server of this data folder listens at `url` in this network, as it wrote down itself."""
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
    network = f"{_boot_id()}-{_NETWORK_NAMESPACE.stat().st_ino}"
    return data_dir / FOLDER / f"{network}-{urlsplit(url).netloc}.lock"


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _hold(path: Path) -> int:
    """A descriptor that holds the lock of the file that has this name: not of one that was just removed.

    Others have it for a moment only: the server that had the port before, and commands that look.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(path, lock):
                return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock", str(path)) from None
            time.sleep(_POLL_SECONDS)
        except OSError:
            os.close(lock)
            raise
        os.close(lock)


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_left(folder: Path) -> None:
    """Remove the files of servers of this machine that were killed. A killed container's network is gone, so
    no later server has the same name. Of other machines the kernel need not know the locks."""
    for path in folder.glob(f"{_boot_id()}-*.lock"):
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:  # a server that listens
            pass
        finally:
            os.close(lock)
