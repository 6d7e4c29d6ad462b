"""The store in a local folder. Equal bytes are shared by hard links where the file system allows it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import structlog

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

log = structlog.get_logger(__name__)


class LocalStore:
    """Objects are files below `root`; a temporary name, fsync and rename make each appear whole.

    Who can access `root` can access what is in it: where the store makes it that is its owner, and where an
    operator did, perhaps for an API and workers of several users, whomever its mode and its group say.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            make_folder(root)
        except OSError as error:
            raise StoreDenied(f"{root} cannot be made: {error.strerror or error}") from error

    def put(self, key: str, path: Path, check: Check = go_on) -> str:
        target = self._path(key)
        sha256 = sha256_of(path, check)
        self._place(path, target, check)
        return sha256

    def get(self, key: str, path: Path, check: Check = go_on) -> None:
        with _reached():
            _place(self._existing(key), path, check)

    def link(self, src_key: str, dst_key: str, check: Check = go_on) -> None:
        with _reached():
            self._place(self._existing(src_key), self._path(dst_key), check)

    def open(self, key: str) -> BinaryIO:
        with _reached():
            return self._existing(key).open("rb")

    def url(self, _key: str, _name: str, _seconds: int, /) -> None:
        return None

    def size(self, key: str) -> int:
        with _reached():
            return self._existing(key).stat().st_size

    def exists(self, key: str) -> bool:
        with _reached():
            return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        with _reached():
            found = [
                Path(folder, name).relative_to(self.root).as_posix()
                for folder, _, names in os.walk(self._path(prefix), onerror=_unless_missing)
                for name in names
                if not name.startswith(_TEMPORARY)
            ]
        return iter(sorted(found))

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        with _reached():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def probe(self) -> None:
        with _reached():
            is_there = self.root.is_dir()
        if not is_there:
            raise StoreUnreachable(f"there is no folder {self.root}")

    def _place(self, source: Path, target: Path, check: Check) -> None:
        """Make `target` an object, which those can access who can access the root."""
        with _reached():
            _place(source, target, check, _Access.of(self.root) if self.root.exists() else _Access())

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _existing(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise ObjectNotFound(key)
        return path


@dataclass(frozen=True)
class _Access:
    """Who can access what the store makes.

    folder_mode: of folders, S_ISGID included. group: the id of the group that the mode is about, None where
    the mode gives no group access.
    """

    folder_mode: int = FOLDER_MODE
    group: int | None = None

    @classmethod
    def of(cls, root: Path) -> _Access:
        """As `root` has it."""
        found = root.stat()
        mode = FOLDER_MODE | (found.st_mode & (0o777 | stat.S_ISGID))
        return cls(mode, found.st_gid if mode & stat.S_IRWXG else None)

    def give_file(self, path: Path) -> None:
        """Give a file this access: a link to one in a scratch folder has mode and group of that."""
        self.give_group(path)
        if mode_of(path) != self.folder_mode & 0o666:
            path.chmod(self.folder_mode & 0o666)

    def give_group(self, path: Path) -> None:
        """Give a file or folder this group, if this process may."""
        if self.group is None or path.stat().st_gid == self.group:
            return
        try:
            os.chown(path, -1, self.group)  # of a folder it clears no bit
        except PermissionError:
            _warn_of_group(self.group)


@cache
def _warn_of_group(group: int) -> None:
    hint = "Let the users of API and workers be members of the group of the store's folder."
    log.warning("store_group_not_given", group=group, hint=hint)


@contextmanager
def _reached() -> Iterator[None]:
    """Raise what the system says of the store as StoreUnavailable."""
    try:
        yield
    except PermissionError as error:
        raise StoreDenied(str(error)) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise StoreDenied(str(error)) from error
        if error.errno in _SERVER_GONE:
            raise StoreUnreachable(os.strerror(error.errno)) from error
        raise


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _place(source: Path, target: Path, check: Check, access: _Access | None = None) -> None:
    """Make `target` the same bytes as `source`, durably and in one step.

    access: of the file, and of the folders that this makes; private folders and the file's own mode unless
    given.
    """
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    try:
        with room_for(target):
            _make_folders(target.parent, access or _Access())
            _link_or_copy(source, temporary, check)
            if access is not None:
                access.give_file(temporary)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        with suppress(OSError):  # of a folder that cannot be reached, which was said above
            temporary.unlink(missing_ok=True)


def _make_folders(folder: Path, access: _Access) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder, access.folder_mode)
    for path in missing:
        access.give_group(path)


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
