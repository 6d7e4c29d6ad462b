"""The store in a local folder. Equal bytes are shared by hard links where the file system allows it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from api.artifacts.store import StoreError, check_key
from compression.errors import ResourceError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
_TEMPORARY = ".tmp-"


class LocalStore:
    """Objects are files below `root`; a temporary name, fsync and rename make each appear whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, key: str, path: Path) -> None:
        _place(path, self._path(key))

    def get(self, key: str, path: Path) -> None:
        _place(self._existing(key), path)

    def link(self, src_key: str, dst_key: str) -> None:
        _place(self._existing(src_key), self._path(dst_key))

    def open(self, key: str) -> BinaryIO:
        return self._existing(key).open("rb")

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

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise StoreError("object_not_found", f"The store has no object {key!r}.")
        return path


def _place(source: Path, target: Path) -> None:
    """Make `target` the same bytes as `source`, durably and in one step."""
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            shutil.copyfile(source, temporary)
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise ResourceError(
                "disk_full", f"No room to store {target.name}.", "Free disk space and retry the job."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
