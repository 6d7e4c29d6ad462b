"""Nobody but its user reads the data folder, also one that an earlier version left open to all."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from api.data_dir import examine_data_dir, secure_data_dir
from api.database import Database
from api.private import make_folder, mode_of
from api.settings import Settings

IN_THE_STORE = {"artifacts", "artifacts/work", "artifacts/work/job", "artifacts/work/job/shard"}
"""What the folder `old` has in its local store, laid out as `api/artifacts` does it."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def old(settings: Settings) -> Path:
    """A data folder as versions before made it, under the usual umask."""
    folder = settings.data_dir
    (folder / "artifacts" / "work" / "job").mkdir(parents=True)
    for name in ("bitmill.db", "bitmill.db-wal", "secret.key", "artifacts/work/job/shard"):
        (folder / name).write_text("content")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def exposed(folder: Path) -> set[str]:
    """What others than the owner can access, relative to the folder; itself is `.`."""
    return {str(path.relative_to(folder)) for path in (folder, *folder.rglob("*")) if mode_of(path) & 0o077}


def test_a_folder_of_an_earlier_version_becomes_private(old: Path, settings: Settings) -> None:
    assert len(exposed(old)) == 8
    access = secure_data_dir(settings)
    assert (access.changed, access.warning) == (8, None)
    assert exposed(old) == set()
    assert secure_data_dir(settings).changed == 0


def test_a_new_folder_is_private_and_so_are_those_above_it(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "a" / "b")
    assert secure_data_dir(settings).changed == 0
    assert exposed(tmp_path / "a") == set()


def test_a_folder_with_other_things_in_it_keeps_its_mode_and_is_told(old: Path, settings: Settings) -> None:
    notes = old / "notes.txt"
    notes.write_text("mine")
    notes.chmod(0o644)
    assert examine_data_dir(settings).exposed_because == "it also holds 'notes.txt'"
    access = secure_data_dir(settings)
    assert access.changed == 3
    assert exposed(old) == {".", "notes.txt", *IN_THE_STORE}  # the last are perhaps not ours
    assert "0755" in (access.warning or "")
    assert "chmod 700" in (access.warning or "")


def test_what_settings_put_there_is_no_other_thing(
    old: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(old / "huggingface"))
    (old / "huggingface").mkdir(mode=0o755)
    (old / "lost+found").mkdir(mode=0o700)
    assert secure_data_dir(settings).warning is None
    assert mode_of(old) == 0o700


def test_only_the_store_and_scratch_of_the_settings_are_searched(old: Path, tmp_path: Path) -> None:
    settings = Settings(data_dir=old, store_url=f"file://{tmp_path / 'store'}")
    assert secure_data_dir(settings).warning is None
    assert exposed(old) == IN_THE_STORE


@pytest.mark.parametrize("place", ["elsewhere/jobs.db", "data/db/jobs.db", "relative.db"])
def test_a_database_is_private_wherever_it_is(
    old: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        file.with_name(file.name + suffix).touch(0o644)
    monkeypatch.chdir(tmp_path)
    settings = Settings(data_dir=old, database_url=f"sqlite:///{place if place == 'relative.db' else file}")
    for name in ("bitmill.db", "bitmill.db-wal"):
        (old / name).unlink()
    assert secure_data_dir(settings).warning is None
    assert mode_of(old) == 0o700
    assert {path.name for path in file.parent.glob("*.db*") if mode_of(path) & 0o077} == set()


def test_a_data_folder_behind_a_link(old: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(old)
    access = secure_data_dir(Settings(data_dir=tmp_path / "link"))
    assert (access.changed, access.warning) == (8, None)
    assert exposed(old) == set()


def test_a_file_that_goes_meanwhile_ends_nothing(
    old: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = old / "artifacts" / "work" / "job" / "shard"
    walk = os.walk

    def walk_as_it_is_removed(*given: Any, **named: Any) -> Any:
        for found in walk(*given, **named):
            if "shard" in found[2]:
                shard.unlink()
            yield found

    monkeypatch.setattr(os, "walk", walk_as_it_is_removed)
    assert secure_data_dir(settings).warning is None
    assert not shard.exists()


def test_another_users_folder_and_a_shared_one_keep_their_modes(
    old: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.chmod(0o1777)
    assert secure_data_dir(settings).exposed_because == "its sticky bit is set"
    assert exposed(old) == {"."}
    old.chmod(0o755)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert f"it belongs to user {user}" in (secure_data_dir(settings).warning or "")
    assert mode_of(old) == 0o755


def test_links_are_not_followed(old: Path, settings: Settings, tmp_path: Path) -> None:
    elsewhere = tmp_path / "model"
    elsewhere.mkdir(mode=0o755)
    (elsewhere / "weights").write_text("x")
    (elsewhere / "weights").chmod(0o644)
    (old / "scratch").symlink_to(elsewhere)
    (old / "artifacts" / "link").symlink_to(elsewhere / "weights")
    secure_data_dir(settings)
    assert exposed(elsewhere) == {".", "weights"}


def test_a_database_is_private_from_its_first_byte(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        database = Database(f"sqlite:///{tmp_path / 'new' / 'jobs.db'}")
        with database.write() as session:
            session.connection().exec_driver_sql("CREATE TABLE t (x)")
            modes = {path.name: mode_of(path) for path in (tmp_path / "new").iterdir()}
        database.close()
        given = tmp_path / "given.db"
        sqlite3.connect(given).execute("CREATE TABLE t (x)").connection.close()
        database = Database(f"sqlite:///{given}")
        with database.write() as session:
            session.connection()
        database.close()
    finally:
        os.umask(before)
    assert modes == {"jobs.db": 0o600, "jobs.db-wal": 0o600, "jobs.db-shm": 0o600}
    assert mode_of(tmp_path / "new") == 0o700
    assert mode_of(given) == 0o644  # secure_data_dir takes the access of files that exist


def test_folders_that_exist_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_folder(tmp_path / "a" / "b")
    assert mode_of(tmp_path) == 0o755
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
