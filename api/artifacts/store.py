"""Where finished files live: an object store's few verbs, over keys that are relative paths.

Keys: work/<job>/<sha256>.safetensors for finished layers; artifacts/<job>/<token>/<file> for what a job
published, of which manifest.json is written last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")


class StoreError(Exception):
    """The store cannot do what was asked. Codes: `object_not_found`, `bad_key`, `unknown_store`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Store(Protocol):
    """Objects appear whole or not at all, and are never changed in place.

    Every method raises StoreError `bad_key` for a key that is not a clean relative path, and
    `object_not_found` where an object must exist and does not.
    """

    def put(self, key: str, path: Path) -> None:
        """Store the file's bytes under `key`, durable when this returns. The file must not change afterwards.

        Raises ResourceError `disk_full` where there is no room.
        """

    def get(self, key: str, path: Path) -> None:
        """Make the object's bytes a file at `path`, which must not be written to afterwards."""

    def link(self, src_key: str, dst_key: str) -> None:
        """Make an object readable under a second key, without moving its bytes where the store can."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader of the object."""

    def size(self, key: str) -> int:
        """The object's size in bytes."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""

    def list(self, prefix: str) -> Iterator[str]:
        """All keys below a folder, sorted."""

    def delete(self, prefix: str) -> None:
        """Remove the object of that key, or all objects below that folder; nothing there is no error."""


def check_key(key: str) -> str:
    """The key, if it is a clean relative path: no empty, `.` or `..` segment, no control character."""
    segments = key.split("/")
    if _UNSAFE.search(key) or any(segment in ("", ".", "..") for segment in segments):
        raise StoreError("bad_key", f"{key!r} is not a clean relative path.")
    return key


def open_store(url: str) -> Store:
    """The store of that URL: `file://` and an absolute path.

    Raises:
        StoreError: `unknown_store`.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise StoreError("unknown_store", f"{url!r} is not a store: give file:// and an absolute path.")
    from api.artifacts.local import LocalStore

    return LocalStore(Path(unquote(parts.path)))


def work_key(job_id: str, sha256: str) -> str:
    """Key of a finished layer's shard."""
    return f"work/{job_id}/{sha256}.safetensors"


def artifact_key(job_id: str, token: int, name: str) -> str:
    """Key of a published file; the fencing token keeps attempts apart."""
    return f"artifacts/{job_id}/{token}/{name}"
