"""A model's headers without its weights, for planning before anything is downloaded.

What comes out is a folder that `read_checkpoint` reads like any other: config and index are whole, all other
files have their real size and, where they are safetensors files, their real header. The rest is a hole that
takes no room on disk.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from compression.boundary import writing
from compression.checkpoint.headers import INDEX_FILE, MAX_CONFIG_BYTES, MAX_HEADER_BYTES
from compression.errors import ResourceError, SourceError
from compression.hub.client import HubClient, HubCommit
from compression.hub.environment import HubEnvironment
from compression.hub.selection import RemoteFile, wanted_files

_FIRST_BYTES = 64 << 10
"""Holds most headers, so that most take one request."""
_THREADS = 16
_MAX_FILES = 2_000
"""Of weights. More would keep a request waiting for minutes."""

Read = Callable[[str, int, int], bytes]
"""Gives bytes [begin, end) of the file of that name, fewer where it is shorter."""


def header_folder(client: HubClient, commit: HubCommit, environment: HubEnvironment) -> Path:
    """The folder, kept under HF_HOME: a commit's headers never change.

    Raises SourceError: what HubClient and `wanted_files` raise.
    """
    owner, _, name = commit.ref.id.partition("/")
    folder = environment.home / "bitmill" / "headers" / f"{owner}--{name}" / commit.ref.revision
    read = partial(client.read, commit)

    def fill(building: Path) -> None:
        files = wanted_files(commit.ref.id, commit.files, lambda: read(INDEX_FILE, 0, MAX_HEADER_BYTES))
        write_headers(building, commit.ref.id, files, read)

    return kept(folder, fill)


def kept(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that is there already, or appears whole once it is filled."""
    if folder.is_dir():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        fill(building)
        with writing(folder):
            building.rename(folder)
    except ResourceError:
        if not folder.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def write_headers(folder: Path, model: str, files: Sequence[RemoteFile], read: Read) -> None:
    """Write what planning reads of a model's files. model: what errors call it.

    Raises SourceError: too_many_files, and what `read` raises.
    """

    def write(file: RemoteFile) -> None:
        _write(folder / file.name, file.size, _beginning(file, read))

    if len(files) > _MAX_FILES:
        raise SourceError(
            "too_many_files",
            f"{model!r} has {len(files)} files; at most {_MAX_FILES} are planned before a download.",
            "Download the model, and give its folder.",
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(write, files))


def _beginning(file: RemoteFile, read: Read) -> bytes:
    """What planning reads of a file."""
    if file.name == "config.json":
        return read(file.name, 0, MAX_CONFIG_BYTES)
    if file.name == INDEX_FILE:
        return read(file.name, 0, MAX_HEADER_BYTES)
    if not file.name.endswith(".safetensors") or file.size < 8:
        return b""
    begin = read(file.name, 0, min(file.size, _FIRST_BYTES))
    header = 8 + struct.unpack("<Q", begin[:8].ljust(8, b"\0"))[0]
    end = min(header, file.size, 8 + MAX_HEADER_BYTES)
    if end > len(begin):
        begin += read(file.name, len(begin), end)
    return begin[:end]


def _write(path: Path, size: int, beginning: bytes) -> None:
    with writing(path), path.open("wb") as file:
        file.write(beginning)
        os.truncate(file.fileno(), max(size, len(beginning)))
