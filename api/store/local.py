"""The store in a local folder. Equal bytes are shared by hard links where the file system allows it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from api.store.base import (
    Check,
    ObjectNotFound,
    StoreDenied,
    StoreUnreachable,
    check_key,
    go_on,
    room_for,
    sha256_of,
)

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_SERVER_GONE = (errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT)  # of a network file system
_TEMPORARY = ".tmp-"
_CHUNK_BYTES = 4 << 20


class LocalStore:
    """Objects are files below `root`; a temporary name, fsync and rename make each appear whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, key: str, path: Path, check: Check = go_on) -> str:
        target = self._path(key)
        sha256 = sha256_of(path, check)
        _place(path, target, check)
        return sha256

    def get(self, key: str, path: Path, check: Check = go_on) -> None:
        _place(self._existing(key), path, check)

    def link(self, src_key: str, dst_key: str, check: Check = go_on) -> None:
        _place(self._existing(src_key), self._path(dst_key), check)

    def open(self, key: str) -> BinaryIO:
        return self._existing(key).open("rb")

    def url(self, _key: str, _name: str, _seconds: int, /) -> None:
        return None

    def size(self, key: str) -> int:
        return self._existing(key).stat().st_size

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        found = [
            path.relative_to(self.root).as_posix()
            for path in self._path(prefix).rglob("*")
            if path.is_file() and not path.name.startswith(_TEMPORARY)
        ]
        return iter(sorted(found))

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def probe(self) -> None:
        if not self.root.is_dir():
            raise StoreUnreachable(f"there is no folder {self.root}")

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFound(key)
        return path


def _place(source: Path, target: Path, check: Check) -> None:
    """Make `target` the same bytes as `source`, durably and in one step."""
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        with room_for(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source, temporary, check)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    except PermissionError as error:
        raise StoreDenied(str(error)) from error
    except OSError as error:
        if error.errno in _SERVER_GONE:
            raise StoreUnreachable(os.strerror(error.errno)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _link_or_copy(source: Path, target: Path, check: Check) -> None:
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
    with source.open("rb") as original, target.open("xb") as copy:
        while chunk := original.read(_CHUNK_BYTES):
            check()
            copy.write(chunk)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
