"""What is published is what the engine wrote, whole or not at all, and a store that is away is waited for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from api.store.base import Store, StoreUnreachable, go_on
from api.store.factory import open_store
from api.store.keys import artifact_folder
from api.store.local import LocalStore
from tests.support.gate import Gate
from worker import retry
from worker.upload import UploadError, copy, publish, put_shard, remove, remove_older

WEIGHTS = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    (folder / "extra").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "extra" / "notes.txt").write_bytes(b"notes")
    return folder


def test_the_manifest_names_every_file_with_size_and_sha256(store: LocalStore, output: Path) -> None:
    put_shard(store, output / "model.safetensors", "job", WEIGHTS, go_on)
    key = publish(store, output, "job", 7, {"model.safetensors": WEIGHTS}, go_on)
    assert key == "artifacts/job/7/manifest.json"
    with store.open(key) as file:
        manifest = json.load(file)
    assert manifest == {
        "job": "job",
        "files": [
            {"name": "extra/notes.txt", "size": 5, "sha256": hashlib.sha256(b"notes").hexdigest()},
            {"name": "model.safetensors", "size": 7, "sha256": WEIGHTS},
        ],
    }
    for file in manifest["files"]:
        with store.open(f"artifacts/job/7/{file['name']}") as stored:
            assert hashlib.sha256(stored.read()).hexdigest() == file["sha256"]


def test_a_shard_is_published_as_it_was_stored_when_its_layer_was_finished(
    store: LocalStore, output: Path
) -> None:
    shard = output / "model.safetensors"
    put_shard(store, shard, "job", WEIGHTS, go_on)
    shard.unlink()  # the stored one is a link to it
    shard.write_bytes(b"damaged")
    publish(store, output, "job", 7, {"model.safetensors": WEIGHTS}, go_on)
    with store.open("artifacts/job/7/model.safetensors") as stored:
        assert stored.read() == b"weights"


def test_a_shard_that_changed_after_it_was_solved_is_refused(store: LocalStore, output: Path) -> None:
    other = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(UploadError, match=r"model\.safetensors") as caught:
        put_shard(store, output / "model.safetensors", "job", other, go_on)
    assert caught.value.code == "upload_corrupt"


def test_a_stop_between_files_leaves_no_manifest(store: LocalStore, output: Path) -> None:
    def stop_after_the_first() -> None:
        if store.exists("artifacts/job/7/extra/notes.txt"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        publish(store, output, "job", 7, {}, stop_after_the_first)
    assert list(store.list("artifacts/job")) == ["artifacts/job/7/extra/notes.txt"]


def test_removal_spares_the_uploads_of_later_attempts(store: LocalStore, output: Path) -> None:
    for token in (2, 9, 10):
        publish(store, output, "job", token, {}, go_on)
    remove_older(store, artifact_folder("job"), 9)
    assert {key.split("/")[2] for key in store.list("artifacts/job")} == {"9", "10"}
    remove(store, artifact_folder("job"), 9)
    assert {key.split("/")[2] for key in store.list("artifacts/job")} == {"10"}


def test_a_copy_is_what_was_published_the_manifest_last(
    store: LocalStore, output: Path, tmp_path: Path
) -> None:
    elsewhere = LocalStore(tmp_path / "elsewhere")
    publish(store, output, "job", 7, {}, go_on)
    copy(elsewhere, output, "job/7", go_on)
    names = ["extra/notes.txt", "manifest.json", "model.safetensors"]
    assert list(elsewhere.list("job")) == [f"job/7/{name}" for name in names]
    for name in names:
        with elsewhere.open(f"job/7/{name}") as there, store.open(f"artifacts/job/7/{name}") as here:
            assert there.read() == here.read()

    (output / "model.safetensors").unlink()  # the stored one is a link to it
    (output / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UploadError):
        copy(elsewhere, output, "job/8", go_on)
    assert "job/8/manifest.json" not in elsewhere.list("job")


class TestAStoreThatIsAway:
    """S3 behind a gate."""

    @pytest.fixture
    def away(self, gate: Gate) -> Store:
        return open_store(gate.store_url)

    def test_the_upload_goes_on_behind_what_is_there(self, gate: Gate, away: Store, output: Path) -> None:
        large = 3_000_000
        for name in ("a", "b"):
            (output / name).write_bytes(name.encode() * large)
        gate.shut_after = large + large // 2
        with capture_logs() as logs:

            def come_back() -> None:
                if logs and gate.is_shut:
                    gate.open()

            key = publish(away, output, "job", 7, {}, come_back)
        assert "store_unreachable" in {line["event"] for line in logs}
        with away.open(key) as file:
            manifest = json.load(file)
        assert {file["name"]: file["size"] for file in manifest["files"]} == {
            "a": large, "b": large, "extra/notes.txt": 5, "model.safetensors": 7,
        }  # fmt: skip
        assert away.size("artifacts/job/7/b") == large
        assert gate.sent < 3 * large

    def test_patience_ends(
        self, gate: Gate, away: Store, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retry, "STORE_RETRY_SECONDS", 0)
        gate.shut()
        with pytest.raises(StoreUnreachable):
            publish(away, output, "job", 7, {}, go_on)

    def test_who_waits_can_be_stopped(self, gate: Gate, away: Store, output: Path) -> None:
        def stop_once_it_is_away() -> None:
            if gate.is_shut:
                raise InterruptedError

        gate.shut_after = 0
        with pytest.raises(InterruptedError):
            publish(away, output, "job", 7, {}, stop_once_it_is_away)
