"""The store in S3, on a real server: large objects, what is checked, and what goes wrong."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from api.store import s3 as module
from api.store.base import StoreDenied, StoreUnreachable
from api.store.factory import open_store
from tests.support.gate import Gate
from tests.support.s3 import ADMIN, READER, S3Server


class Stop(Exception):
    """Somebody cancelled."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Two parts and a rest."""
    path = tmp_path / "large"
    block = hashlib.sha512(b"seed").digest() * (1 << 14)
    path.write_bytes(block * (2 * module.PART_BYTES // len(block)) + b"rest")
    return path


def prefix(url: str) -> str:
    return urlsplit(url).path.strip("/")


def uploads_begun(s3: S3Server, url: str) -> list[Any]:
    answer = s3.client.list_multipart_uploads(Bucket="store", Prefix=prefix(url))
    found: list[Any] = answer.get("Uploads", [])
    return found


def test_large_objects_go_in_parts(s3: S3Server, in_s3: str, large: Path, tmp_path: Path) -> None:
    store = open_store(in_s3)
    sha256 = store.put("work/a", large)
    assert sha256 == hashlib.sha256(large.read_bytes()).hexdigest()
    store.link("work/a", "artifacts/a")
    store.delete("work")
    store.get("artifacts/a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("back")] == ["back"]
    with store.open("artifacts/a") as reader:
        reader.seek(module.PART_BYTES * 2 - 1)
        assert reader.read(9) == large.read_bytes()[-5:]
    etag = s3.client.head_object(Bucket="store", Key=f"{prefix(in_s3)}/artifacts/a")["ETag"]
    assert etag.strip('"').endswith("-3")
    assert uploads_begun(s3, in_s3) == []


def test_the_server_is_told_the_sha256_that_it_has_to_check(s3: S3Server, in_s3: str, file: Path) -> None:
    sha256 = open_store(in_s3).put("a", file)
    head = s3.client.head_object(Bucket="store", Key=f"{prefix(in_s3)}/a", ChecksumMode="ENABLED")
    assert base64.b64decode(head["ChecksumSHA256"]).hex() == sha256


def test_bytes_that_change_on_the_way_are_refused(in_s3: str, gate: Gate, file: Path) -> None:
    gate.replace = (b"0123456789", b"0123456780")
    store = open_store(in_s3)
    with pytest.raises(StoreUnreachable):
        store.put("a", file)
    assert not store.exists("a")


def test_many_objects_are_deleted_in_batches(in_s3: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DELETED_AT_ONCE", 2)
    store = open_store(in_s3)
    for number in range(5):
        store.put(f"a/{number}", file)
    store.delete("a")
    assert list(store.list("a")) == []


def test_a_stop_comes_through_while_bytes_move(s3: S3Server, in_s3: str, gate: Gate, large: Path) -> None:
    store = open_store(in_s3)

    def stop_at_the_second_part() -> None:
        if gate.sent > module.PART_BYTES:
            raise Stop

    with pytest.raises(Stop):
        store.put("a", large, stop_at_the_second_part)
    assert not store.exists("a")
    give_up = time.monotonic() + 10
    while uploads_begun(s3, in_s3) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert uploads_begun(s3, in_s3) == []


def test_a_stop_does_not_wait_for_a_server_that_hangs(in_s3: str, gate: Gate, large: Path) -> None:
    store = open_store(in_s3)
    gate.hold_after = 0
    stopped: list[float] = []

    def stop_once_it_hangs() -> None:
        if gate.is_held:
            stopped.append(time.monotonic())
            raise Stop

    with pytest.raises(Stop):
        store.put("a", large, stop_once_it_hangs)
    assert time.monotonic() - stopped[0] < 2


def test_a_server_that_goes_away_in_an_upload(in_s3: str, gate: Gate, large: Path) -> None:
    store = open_store(in_s3)
    gate.shut_after = module.PART_BYTES
    with pytest.raises(StoreUnreachable) as caught:
        store.put("a", large)
    assert (caught.value.code, caught.value.hint != "") == ("store_unreachable", True)
    gate.open()
    store.probe()
    assert not store.exists("a")
    store.put("a", large)
    assert store.size("a") == large.stat().st_size


def test_nobody_answers(in_s3: str, gate: Gate, tmp_path: Path) -> None:
    store = open_store(in_s3)
    gate.shut()
    calls: list[Callable[[], Any]] = [
        store.probe,
        lambda: store.get("a", tmp_path / "back"),
        lambda: store.delete("a"),
    ]
    for call in calls:
        with pytest.raises(StoreUnreachable):
            call()


def test_an_address_that_is_none(in_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(StoreUnreachable, match="no address"):
        open_store(in_s3)


def test_who_may_not_is_told_so(
    s3: S3Server, in_s3: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(in_s3).put("a", file)
    s3.use(monkeypatch, tmp_path, READER)
    stranger = open_store(in_s3)
    calls: list[Callable[[], Any]] = [
        stranger.probe,
        lambda: stranger.put("b", file),
        lambda: stranger.size("a"),
        lambda: stranger.get("a", tmp_path / "back"),
        lambda: stranger.list("a"),
        lambda: stranger.delete("a"),
    ]
    for call in calls:
        with pytest.raises(StoreDenied) as caught:
            call()
        assert (caught.value.code, caught.value.hint != "") == ("store_denied", True)
        assert "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, tmp_path, ADMIN)
    store = open_store("s3://no-such-bucket/folder")
    with pytest.raises(StoreDenied, match="no-such-bucket"):
        store.probe()
    with pytest.raises(StoreDenied, match="NoSuchBucket"):
        store.list("a")


def test_a_store_may_be_a_whole_bucket(in_s3: str, file: Path) -> None:
    open_store(in_s3).put("a/b", file)
    whole = open_store("s3://store/")
    assert list(whole.list(prefix(in_s3))) == [f"{prefix(in_s3)}/a/b"]
