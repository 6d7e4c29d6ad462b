"""Scratch folders: one for each worker process, and in it one for each attempt.

A worker process holds a lock on its folder, which the kernel drops with the process. A folder whose lock is
free was left by a process that died: the next worker that starts removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from api.private import FILE_MODE, FOLDER_MODE, make_folder
from worker.host import needed_of_host

LOCK = ".lock"
_PAGE_BYTES = 4096
UNUSABLE = "The scratch folder cannot be used"

log = structlog.get_logger(__name__)


class Scratch:
    """This process's folder `<root>/<name>`, mode 0700."""

    def __init__(self, root: Path, name: str) -> None:
        make_folder(root)
        self._root = root
        self.folder = root / name
        with _locked(root):
            _remove_abandoned(root)
            self.folder.mkdir(mode=FOLDER_MODE)
            self._lock = _lock(self.folder, fcntl.LOCK_EX)

    @contextmanager
    def attempt(self, job_id: str, token: int) -> Iterator[Path]:
        """A new empty folder for one attempt, removed at the end whatever happens. What cannot be removed
        stays, and the log says so.

        Raises:
            HostFault: it cannot be made.
        """
        folder = self.folder / f"{job_id}-{token}"
        with needed_of_host(UNUSABLE):
            folder.mkdir(mode=FOLDER_MODE)
        try:
            yield folder
        finally:
            _remove(folder)

    def fault(self) -> OSError | None:
        """Why no file can be made here now, whatever the job; None if one can."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(_PAGE_BYTES))
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """Remove the folder and give up the lock."""
        try:
            with _locked(self._root):
                _remove(self.folder)
        except OSError as error:
            log.warning("scratch_not_removed", folder=str(self.folder), reason=str(error))
        finally:
            os.close(self._lock)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("scratch_not_removed", folder=str(folder), reason=str(error))
        shutil.rmtree(folder, ignore_errors=True)  # all but that one


def _remove_abandoned(root: Path) -> None:
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        try:
            lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        shutil.rmtree(folder, ignore_errors=True)  # its engine may be dying in it: the rest at the next start
        os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, how: int) -> int:
    """A descriptor that holds the folder's lock until closed. BlockingIOError if LOCK_NB finds it held."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor
