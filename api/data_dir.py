"""The data folder is for its user alone. It holds API keys, the secret of their hashes, and models."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import make_url

from api.private import UMASK, is_exposed, make_folder, mode_of
from api.settings import Settings
from api.store.factory import local_folder
from compression.hub.environment import CACHE_VARIABLES

_OWN_NAMES = ("credentials.json", "secret.key", "serve.lock", "listening", "artifacts", "scratch")
_OWN_TEMPORARY = (".credentials.json.", ".secret.key.", "..secret.key.")
_SQLITE_SUFFIXES = ("", "-wal", "-shm", "-journal")
_NOT_OURS = "Give Bitmill a folder of its own with BITMILL_DATA_DIR, or run `chmod 700` on this one."

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DataDirAccess:
    """Who can access the data folder.

    changed: how many files and folders lost the access of group and others just now.
    exposed_because: why others still have access to the folder itself; None where they have none.
    """

    folder: Path
    changed: int = 0
    exposed_because: str | None = None

    @property
    def warning(self) -> str | None:
        """What to tell the operator, if the folder is exposed."""
        if self.exposed_because is None:
            return None
        mode = f"{mode_of(self.folder):04o}"
        return f"{self.folder} has mode {mode}, and stays so: {self.exposed_because}. {_NOT_OURS}"


def secure_data_dir(settings: Settings) -> DataDirAccess:
    """Make the data folder, or take from group and others the access that earlier versions gave them.

    Only what Bitmill made is changed. A folder that is another user's, or that holds other things too, may be
    shared on purpose: its mode stays. What Bitmill writes into it is private all the same.
    """
    folder = settings.data_dir
    make_folder(folder)
    changed = sum(_restrict(path) for path in _exposed_files(settings))
    if is_exposed(folder) and _shared_because(settings) is None:
        changed += _restrict(folder)
    return DataDirAccess(folder, changed, examine_data_dir(settings).exposed_because)


def secure_and_log(settings: Settings) -> None:
    """Secure the data folder, and log what was changed and what others can still access."""
    access = secure_data_dir(settings)
    if access.changed:
        log.info("data_dir_made_private", folder=str(access.folder), changed=access.changed)
    if access.warning is not None:
        log.warning("data_dir_not_private", reason=access.warning)


def examine_data_dir(settings: Settings) -> DataDirAccess:
    """Who can access the data folder, which must exist. Changes nothing."""
    folder = settings.data_dir
    if not is_exposed(folder):
        return DataDirAccess(folder)
    return DataDirAccess(folder, 0, _shared_because(settings) or "its mode was not changed")


def _shared_because(settings: Settings) -> str | None:
    """Why the data folder may be shared on purpose, so that its mode is not Bitmill's to change; None if it
    is."""
    folder = settings.data_dir
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    if status.st_mode & stat.S_ISVTX:
        return "its sticky bit is set"
    known = {*_own_names(settings), *_configured_names(settings), "lost+found"}
    strange = [name for name in sorted(os.listdir(folder)) if name not in known]
    strange = [name for name in strange if not name.startswith(_OWN_TEMPORARY)]
    return f"it also holds {strange[0]!r}" if strange else None


def _own_names(settings: Settings) -> tuple[str, ...]:
    """Entries of the data folder that Bitmill makes."""
    file = Path(make_url(settings.database_url).database or "")
    is_inside = file.parent == settings.data_dir  # a file of SQLite, unless settings put it elsewhere
    database = [f"{file.name}{suffix}" for suffix in _SQLITE_SUFFIXES] if is_inside else []
    return (*database, *_OWN_NAMES)


def _configured_names(settings: Settings) -> set[str]:
    """Entries of the data folder that settings put there: store, scratch folders, the Hub's cache."""
    store = local_folder(settings.store_url)
    caches = [Path(os.environ[name]).expanduser() for name in CACHE_VARIABLES if os.environ.get(name)]
    configured = [path for path in (settings.scratch_dir, store, *caches) if path is not None]
    return {
        path.relative_to(settings.data_dir).parts[0]
        for path in configured
        if path != settings.data_dir and path.is_relative_to(settings.data_dir)
    }


def _exposed_files(settings: Settings) -> Iterator[Path]:
    """What Bitmill made in the data folder and others can access.

    Folders are searched only below an exposed one: others get through no private one, and artifacts may be
    many. An exposed folder comes behind what is in it, so an interrupted search begins again.
    """
    for name in _own_names(settings):
        path = settings.data_dir / name
        if path.is_symlink() or not path.exists() or not is_exposed(path):
            continue
        for parent, folders, files in os.walk(path):  # follows no links; nothing for a file
            for entry in (*folders, *files):
                each = Path(parent, entry)
                if not each.is_symlink() and is_exposed(each):
                    yield each
        yield path


def _restrict(path: Path) -> bool:
    """Take the access of group and others. False where the path is another user's, or gone."""
    try:
        path.chmod(mode_of(path) & ~UMASK)
    except (PermissionError, FileNotFoundError):
        return False
    return True
