"""What every store does, in a local folder and in S3; and what only the folder does."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.private import mode_of
from api.store.base import ObjectNotFound, Store, StoreDenied, StoreError, StoreUnreachable
from api.store.factory import open_store
from api.store.keys import artifact_key, work_key
from api.store.local import LocalStore


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path / 'the store'}")


@pytest.fixture(params=["local", "in_s3"])
def store(request: pytest.FixtureRequest) -> Store:
    given = request.getfixturevalue(request.param)
    return open_store(given) if isinstance(given, str) else given


def test_put_get_link_open_list_delete(store: Store, file: Path, tmp_path: Path) -> None:
    key, published = work_key("job_1", "a" * 64), artifact_key("job_1", 3, "sub/model.safetensors")
    assert not store.exists(key)
    assert store.put(key, file) == hashlib.sha256(b"0123456789").hexdigest()
    store.link(key, published)
    assert (store.exists(key), store.size(published)) == (True, 10)
    with store.open(published) as reader:
        reader.seek(4)
        assert (reader.read(3), reader.tell(), reader.read()) == (b"456", 7, b"789")
        reader.seek(-2, os.SEEK_END)
        assert (reader.read(9), reader.read(1)) == (b"89", b"")
    store.get(published, tmp_path / "new folder" / "copy")
    assert (tmp_path / "new folder" / "copy").read_bytes() == b"0123456789"
    assert list(store.list("artifacts/job_1")) == [published]
    assert list(store.list("artifacts/job")) == []
    store.delete("work/job_1")
    store.delete("work/job_1")
    assert not store.exists(key)
    assert store.exists(published)
    store.probe()


def test_an_empty_object(store: Store, file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"")
    store.put("work/a", file)
    with store.open("work/a") as reader:
        assert reader.read() == b""
    store.get("work/a", tmp_path / "back")
    assert (store.size("work/a"), (tmp_path / "back").read_bytes()) == (0, b"")


def test_lists_are_sorted_and_stay_below_their_folder(store: Store, file: Path) -> None:
    for key in ("a/c", "a/b/d", "a-b", "a/b-c", "ab/c"):
        store.put(key, file)
    assert list(store.list("a")) == ["a/b-c", "a/b/d", "a/c"]
    store.delete("a")
    assert [store.exists(key) for key in ("a/c", "a/b/d", "a-b", "ab/c")] == [False, False, True, True]


def test_a_stop_leaves_no_object(store: Store, file: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        store.put("work/a", file, stop)
    assert not store.exists("work/a")


def test_a_stop_comes_through_while_a_large_file_is_read(store: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # hours to read; none of it is on the disk
    started = time.monotonic()

    def stop_after_a_while() -> None:
        if time.monotonic() - started > 0.05:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store.put("work/a", large, stop_after_a_while)
    assert time.monotonic() - started < 1
    assert list(store.list("work")) == []


def test_bytes_are_shared_not_copied(local: Store, file: Path, tmp_path: Path) -> None:
    local.put("work/a", file)
    local.link("work/a", "artifacts/a")
    local.get("artifacts/a", tmp_path / "back")
    assert file.stat().st_nlink == 4


def test_an_object_is_replaced_whole(local: Store, file: Path, tmp_path: Path) -> None:
    local.put("work/a", file)
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with local.open("work/a") as reader:
        local.put("work/a", other)
        assert reader.read() == b"0123456789"
    assert local.size("work/a") == 5
    assert file.read_bytes() == b"0123456789"
    assert list(local.list("work")) == ["work/a"]


def test_putting_the_same_file_twice_changes_nothing(local: Store, file: Path) -> None:
    local.put("work/a", file)
    local.put("work/a", file)
    local.link("work/a", "work/a")
    assert list(local.list("work")) == ["work/a"]
    assert file.stat().st_nlink == 2


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a//b", "../a", "a/../b", "a/.", "a/", "a\\b", "a\nb", "a\0b"]
)
def test_keys_that_are_not_clean(store: Store, file: Path, key: str) -> None:
    store.put("a", file)
    calls: list[Callable[[], Any]] = [
        lambda: store.put(key, file),
        lambda: store.get(key, file),
        lambda: store.link("a", key),
        lambda: store.open(key),
        lambda: store.size(key),
        lambda: store.exists(key),
        lambda: store.list(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.code == "bad_key"


def test_missing_objects(store: Store, tmp_path: Path) -> None:
    key = "work/nothing"
    calls: list[Callable[[], Any]] = [
        lambda: store.open(key),
        lambda: store.size(key),
        lambda: store.get(key, tmp_path / "x"),
        lambda: store.link(key, "b"),
    ]
    for call in calls:
        with pytest.raises(ObjectNotFound) as caught:
            call()
        assert (caught.value.code, caught.value.hint != "") == ("object_not_found", True)
    assert list(store.list("work")) == []


def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path / "store")
    store.put("work/a", file)
    assert file.stat().st_nlink == 1
    assert (tmp_path / "store/work/a").read_bytes() == b"0123456789"


def test_no_room_is_disk_full_and_leaves_nothing(tmp_path: Path) -> None:
    """A real limit, in a process of its own: on another file system the bytes must be copied."""
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.fail("the test needs two file systems: /dev/shm and the temporary folder")
    code = f"""
import os, resource, signal, tempfile
from pathlib import Path
from api.store.local import LocalStore
from compression.errors import ResourceError
source = Path({str(tmp_path / "big")!r})
source.write_bytes(b"x" * 1_000_000)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
    store = LocalStore(Path(folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    try:
        store.put("work/a", source)
    except ResourceError as error:
        assert error.code == "disk_full"
    else:
        raise SystemExit("stored")
    assert os.listdir(Path(folder) / "work") == []
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_stores() -> None:
    for url in (
        "s3://", "s3://bucket/../other", "s3://bucket//folder", "https://bucket", "file://host/path",
        "file:relative", "/tmp",
    ):  # fmt: skip
        with pytest.raises(StoreError) as caught:
            open_store(url)
        assert caught.value.code == "unknown_store"


def test_a_folder_that_is_gone_is_unreachable(local: Store, tmp_path: Path) -> None:
    (tmp_path / "the store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnreachable):
        local.probe()


def test_objects_are_for_those_who_can_access_the_folder(tmp_path: Path) -> None:
    for root_mode, file_mode in ((0o700, 0o600), (0o755, 0o644), (0o770, 0o660)):
        source = tmp_path / f"{root_mode:o}.source"
        source.write_bytes(b"x")
        source.chmod(0o640)
        root = tmp_path / f"{root_mode:o}"
        store = LocalStore(root)
        assert mode_of(root) == 0o700
        root.chmod(root_mode)
        store.put("a/b/file", source)
        store.link("a/b/file", "c/file")
        for key in ("a/b/file", "c/file"):
            assert mode_of(root / key) == file_mode
            assert mode_of((root / key).parent) == root_mode
        store.get("c/file", tmp_path / f"{root_mode:o}.copy")
        assert mode_of(root / "c/file") == file_mode


def test_a_folder_of_a_group_gives_its_group_to_all_in_it(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    group = 12345 if os.geteuid() == 0 else max(os.getgroups())
    os.chown(root, -1, group)
    root.chmod(0o2770)
    source = tmp_path / "scratch file"
    source.write_bytes(b"x")
    store = LocalStore(root)
    store.put("a/b/file", source)
    store.link("a/b/file", "c/file")
    for name in ("a", "a/b", "c"):
        assert ((root / name).stat().st_gid, mode_of(root / name)) == (group, 0o770 | stat.S_ISGID)
    for name in ("a/b/file", "c/file"):
        assert ((root / name).stat().st_gid, mode_of(root / name)) == (group, 0o660)


@contextmanager
def no_access(folder: Path) -> Iterator[None]:
    """This thread may not access the folder, also where the tests are root's."""
    mode = mode_of(folder)
    folder.chmod(0)
    set_file_system_user = ctypes.CDLL(None).setfsuid
    set_file_system_user(65534)
    try:
        yield
    finally:
        set_file_system_user(os.geteuid())
        folder.chmod(mode)


def test_a_folder_that_may_not_be_accessed_refuses(local: Store, file: Path, tmp_path: Path) -> None:
    local.put("work/a", file)
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: local.open("work/a"),
        "size": lambda: local.size("work/a"),
        "exists": lambda: local.exists("work/a"),
        "list": lambda: list(local.list("work")),
        "delete": lambda: local.delete("work"),
        "get": lambda: local.get("work/a", tmp_path / "copy"),
        "link": lambda: local.link("work/a", "work/c"),
        "probe": local.probe,
        "make": lambda: LocalStore(tmp_path / "the store" / "inner"),
    }
    said = {}
    with no_access(tmp_path / "the store"):
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                said[name] = type(error)
    assert said == dict.fromkeys(calls, StoreDenied)
