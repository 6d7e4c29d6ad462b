"""The data folder is for its user alone. It holds API keys, the secret of their hashes, and models."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import make_url

from api.listening import FOLDER as LISTENING
from api.private import UMASK, is_exposed, make_folder, mode_of
from api.settings import Settings
from api.store.factory import local_folder
from compression.hub.environment import CACHE_VARIABLES

_OWN_NAMES = ("credentials.json", "secret.key", "serve.lock", LISTENING)
_DEFAULT_FOLDERS = ("artifacts", "scratch")
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
    """Make the data folder, or take from group and others the access that earlier versions gave them, to it
    and to a database of SQLite, wherever that is.

    Only what Bitmill made is changed. A folder that is another user's, or that holds other things too, may be
    shared on purpose: its mode stays. Beside other things, folders named `artifacts` and `scratch` stay too:
    they may be older than Bitmill. What Bitmill writes is private all the same, but for objects of a store:
    they get the access of the store's folder.
    """
    folder = _folder(settings)
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
    folder = _folder(settings)
    if not is_exposed(folder):
        return DataDirAccess(folder)
    return DataDirAccess(folder, 0, _shared_because(settings) or "its mode was not changed")


def _folder(settings: Settings) -> Path:
    """The data folder itself, also where its path is a link."""
    return settings.data_dir.resolve()


def _shared_because(settings: Settings) -> str | None:
    """Why the data folder may be shared on purpose; None where it is Bitmill's alone, and its mode too."""
    folder = _folder(settings)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
    if status.st_mode & stat.S_ISVTX:
        return "its sticky bit is set"
    strange = _strange_names(settings)
    return f"it also holds {strange[0]!r}" if strange else None


def _strange_names(settings: Settings) -> list[str]:
    """Entries of the data folder that neither Bitmill made nor settings put there."""
    known = {*_OWN_NAMES, *_DEFAULT_FOLDERS, *_configured_names(settings), "lost+found"}
    names = [name for name in sorted(os.listdir(_folder(settings))) if name not in known]
    return [name for name in names if not name.startswith(_OWN_TEMPORARY)]


def _configured_names(settings: Settings) -> set[str]:
    """Entries of the data folder that settings put there: database, store, scratch, the Hub's cache."""
    folder = _folder(settings)
    caches = [Path(os.environ[name]).expanduser() for name in CACHE_VARIABLES if os.environ.get(name)]
    configured = [*_database_files(settings), *_store_and_scratch(settings), *caches]
    inside = [path.resolve() for path in configured]
    return {
        path.relative_to(folder).parts[0] for path in inside if path != folder and path.is_relative_to(folder)
    }


def _database_files(settings: Settings) -> list[Path]:
    """The files of a database of SQLite."""
    url = make_url(settings.database_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return []
    file = Path(url.database).resolve()
    return [file.with_name(f"{file.name}{suffix}") for suffix in _SQLITE_SUFFIXES]


def _store_and_scratch(settings: Settings) -> list[Path]:
    store = local_folder(settings.store_url)
    return [settings.scratch_dir] if store is None else [store, settings.scratch_dir]


def _exposed_files(settings: Settings) -> Iterator[Path]:
    """What Bitmill made and others can access: in the data folder, and the database's files.

    Of store and scratch folders only those at their usual places, others are an operator's; and only where
    nothing strange is beside them. Folders are searched only below an exposed one: others get through no
    private one, and artifacts may be many. An exposed folder comes behind what is in it, so an interrupted
    search begins again.
    """
    folder = _folder(settings)
    made = [*_database_files(settings), *(folder / name for name in _OWN_NAMES)]
    if not _strange_names(settings):
        usual = [settings.data_dir / name for name in _DEFAULT_FOLDERS]
        made += [path for path in _store_and_scratch(settings) if path in usual]
    for path in made:
        if not _is_exposed_now(path):
            continue
        for parent, folders, files in os.walk(path):  # follows no links; nothing for a file
            for entry in (*folders, *files):
                each = Path(parent, entry)
                if _is_exposed_now(each):
                    yield each
        yield path


def _is_exposed_now(path: Path) -> bool:
    """Whether others can access it, and it is no link. Other processes may be removing it, and what this one
    cannot look at it cannot change."""
    try:
        return not path.is_symlink() and is_exposed(path)
    except OSError:
        return False


def _restrict(path: Path) -> bool:
    """Take the access of group and others. False where the path is another user's, or gone."""
    try:
        path.chmod(mode_of(path) & ~UMASK)
    except (PermissionError, FileNotFoundError):
        return False
    return True
