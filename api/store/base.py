"""What a store of files can do, whichever it is: a few verbs, over keys that are relative paths.

StoreError              code, message, hint; bad_key, unknown_store
├── ObjectNotFound      object_not_found
└── StoreUnavailable    nothing is wrong with what was asked
    ├── StoreDenied         store_denied: it answers, and refuses; somebody has to change something
    └── StoreUnreachable    store_unreachable: trying again may help
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import quote

from compression.boundary import is_disk_full
from compression.errors import CompressionError, ResourceError

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_CHUNK_BYTES = 4 << 20

Check = Callable[[], None]
"""Called again and again during a transfer. What it raises stops the transfer, and is raised."""


class StoreError(CompressionError):
    """The store cannot do what was asked."""


class ObjectNotFound(StoreError):
    """There is no object of that key."""

    def __init__(self, key: str) -> None:
        super().__init__("object_not_found", f"The store has no object {key!r}.", "Retry the job.")


class StoreUnavailable(StoreError):
    """The store does not serve now."""


class StoreDenied(StoreUnavailable):
    """The store may not be used so."""

    def __init__(self, reason: str) -> None:
        hint = "Give API and workers the rights that docs/how-to.md lists, and look at BITMILL_STORE_URL."
        super().__init__("store_denied", f"The artifact store refuses: {reason}.", hint)


class StoreUnreachable(StoreUnavailable):
    """The store does not answer, or not as it should."""

    def __init__(self, reason: str) -> None:
        hint = "Try again; if it stays so, check the store, the network and BITMILL_STORE_URL."
        super().__init__("store_unreachable", f"The artifact store cannot be reached: {reason}.", hint)


def go_on() -> None:
    """A check that never stops the transfer."""


class Store(Protocol):
    """Objects appear whole or not at all, and are never changed in place.

    Every method raises StoreUnavailable, those with a key StoreError `bad_key` for one that is not a clean
    relative path, and ObjectNotFound where an object must exist and does not.
    """

    def put(self, key: str, path: Path, check: Check = go_on) -> str:
        """Store the file's bytes under `key`, durable when this returns, and give their sha256. The file must
        not change afterwards.

        Raises ResourceError `disk_full` where there is no room.
        """

    def get(self, key: str, path: Path, check: Check = go_on) -> None:
        """Make the object's bytes a file at `path`, which must not be written to afterwards.

        Raises ResourceError `disk_full` where there is no room.
        """

    def link(self, src_key: str, dst_key: str, check: Check = go_on) -> None:
        """Make an object readable under a second key, without moving its bytes where the store can."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader of the object."""

    def url(self, key: str, name: str, seconds: int, /) -> str | None:
        """A URL from which anybody can download the object, as a file of that name, for that long; None where
        the store has no URLs. Makes no request."""

    def size(self, key: str) -> int:
        """The object's size in bytes."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> Iterator[str]:
        """All keys below a folder, sorted."""

    def delete(self, prefix: str) -> None:
        """Remove the object of that key, or all objects below that folder; nothing there is no error."""

    def probe(self) -> None:
        """Return within seconds if the store answers."""


def check_key(key: str) -> str:
    """The key, if it is a clean relative path: no empty, `.` or `..` segment, no control character."""
    segments = key.split("/")
    if _UNSAFE.search(key) or any(segment in ("", ".", "..") for segment in segments):
        raise StoreError("bad_key", f"{key!r} is not a clean relative path.")
    return key


def disposition(name: str) -> str:
    """The header Content-Disposition of a file that is to be saved under that name."""
    return f"attachment; filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}"


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise ResourceError `disk_full` where what is done needs more room than there is."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        hint = "Free disk space and retry the job."
        raise ResourceError("disk_full", f"No room to store {path.name}.", hint) from error


def sha256_of(path: Path, check: Check) -> str:
    """A file's sha256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            check()
            digest.update(chunk)
    return digest.hexdigest()
