"""The store in a local folder. Equal bytes are shared by hard links where the file system allows it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from api.private import FOLDER_MODE, make_folder, mode_of
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
    """Objects are files below `root`; a temporary name, fsync and rename make each appear whole.

    Who can access `root` can access what is in it: where the store makes it that is its owner, and where an
    operator did, perhaps for an API and workers of several users, whomever its mode says.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        make_folder(root)

    def put(self, key: str, path: Path, check: Check = go_on) -> str:
        target = self._path(key)
        sha256 = sha256_of(path, check)
        self._place(path, target, check)
        return sha256

    def get(self, key: str, path: Path, check: Check = go_on) -> None:
        _place(self._existing(key), path, check)

    def link(self, src_key: str, dst_key: str, check: Check = go_on) -> None:
        self._place(self._existing(src_key), self._path(dst_key), check)

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

    def _place(self, source: Path, target: Path, check: Check) -> None:
        """Make `target` an object, which those can access who can access the root."""
        mode = FOLDER_MODE | (mode_of(self.root) & 0o777 if self.root.exists() else 0)
        _place(source, target, check, mode)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFound(key)
        return path


def _place(source: Path, target: Path, check: Check, folder_mode: int | None = None) -> None:
    """Make `target` the same bytes as `source`, durably and in one step.

    folder_mode: of the folders that this makes, and of the file without the right to execute; the file's own
    mode unless given.
    """
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        with room_for(target):
            make_folder(target.parent, folder_mode or FOLDER_MODE)
            _link_or_copy(source, temporary, check)
            if folder_mode is not None and mode_of(temporary) != folder_mode & 0o666:
                temporary.chmod(folder_mode & 0o666)
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
