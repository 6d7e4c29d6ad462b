"""The folders that the service writes in, made before anything else. A command ends where one cannot be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cli.exits import Exit
from cli.output import fail

if TYPE_CHECKING:
    from api.settings import Settings


def make_data_dir(settings: Settings, *, as_json: bool, to_write: bool = True) -> None:
    """Make the data folder, or end the command with `data_dir_not_writable`. to_write: try to write in it."""
    _make(settings.data_dir, "data_dir", to_write=to_write, as_json=as_json)


def make_scratch_dir(settings: Settings, *, as_json: bool) -> None:
    """Make the scratch folder, or end the command with `scratch_dir_not_writable`."""
    _make(settings.scratch_dir, "scratch_dir", to_write=True, as_json=as_json)


def _make(folder: Path, setting: str, *, to_write: bool, as_json: bool) -> None:
    from api.private import make_folder

    try:
        make_folder(folder)
        if to_write:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        message = f"{folder} cannot be written to: {error.strerror or error}."
        hint = f"Set BITMILL_{setting.upper()} to a folder of this user, or give the user the right to write."
        fail(Exit.FAILED, f"{setting}_not_writable", message, as_json=as_json, hint=hint)
