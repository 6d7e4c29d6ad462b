"""What is published is what the engine wrote, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from api.artifacts.local import LocalStore
from worker.upload import UploadError, publish, remove, remove_older


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


def nothing() -> None:
    return


def test_the_manifest_names_every_file_with_size_and_sha256(store: LocalStore, output: Path) -> None:
    digests = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    key = publish(store, output, "job", 7, digests, nothing)
    assert key == "artifacts/job/7/manifest.json"
    with store.open(key) as file:
        manifest = json.load(file)
    assert manifest == {
        "job": "job",
        "files": [
            {"name": "extra/notes.txt", "size": 5, "sha256": hashlib.sha256(b"notes").hexdigest()},
            {"name": "model.safetensors", "size": 7, "sha256": digests["model.safetensors"]},
        ],
    }
    for file in manifest["files"]:
        with store.open(f"artifacts/job/7/{file['name']}") as stored:
            assert hashlib.sha256(stored.read()).hexdigest() == file["sha256"]


def test_a_shard_that_changed_after_it_was_solved_is_refused(store: LocalStore, output: Path) -> None:
    digests = {"model.safetensors": hashlib.sha256(b"other weights").hexdigest()}
    with pytest.raises(UploadError, match=r"model\.safetensors") as caught:
        publish(store, output, "job", 7, digests, nothing)
    assert caught.value.code == "upload_corrupt"
    assert not store.exists("artifacts/job/7/manifest.json")


def test_a_stop_between_files_leaves_no_manifest(store: LocalStore, output: Path) -> None:
    calls: list[int] = []

    def stop_at_the_second() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        publish(store, output, "job", 7, {}, stop_at_the_second)
    assert list(store.list("artifacts/job")) == ["artifacts/job/7/extra/notes.txt"]


def test_removal_spares_the_uploads_of_later_attempts(store: LocalStore, output: Path) -> None:
    for token in (2, 9, 10):
        publish(store, output, "job", token, {}, nothing)
    remove_older(store, "job", 9)
    assert {key.split("/")[2] for key in store.list("artifacts/job")} == {"9", "10"}
    remove(store, "job", 9)
    assert {key.split("/")[2] for key in store.list("artifacts/job")} == {"10"}
