"""Files for their owner alone: folders have mode 0700, files 0600.

The process's umask stays as it is: it would also apply to the Hub's cache, which users may share.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600
UMASK = 0o077
"""The mode bits of group and others."""


def make_folder(folder: Path, mode: int = FOLDER_MODE) -> None:
    """Make a folder, and those above it that are missing, all with this mode. Others stay as they are."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)  # another process may be making the same
        path.chmod(mode)
    folder.mkdir(exist_ok=True)  # raises where a file has the name


def opener(path: str, flags: int) -> int:
    """For `open`: a file that it makes has mode 0600."""
    return os.open(path, flags, FILE_MODE)


def make_file(path: Path) -> None:
    """Make an empty file of mode 0600, unless it exists."""
    if not path.exists():
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))


def mode_of(path: Path) -> int:
    """The permission bits, 0 to 0o777. Of a link, its own."""
    return stat.S_IMODE(path.lstat().st_mode)


def is_exposed(path: Path) -> bool:
    """Whether the mode gives group or others any access."""
    return bool(mode_of(path) & UMASK)
