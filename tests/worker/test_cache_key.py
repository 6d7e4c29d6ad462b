"""Which work a job is, found out by its worker."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from api.jobs.ledger.models import FileDigest, Job
from compression.recipe import DatasetSpec
from tests.worker.conftest import Submit
from worker import cache_key
from worker.cache_key import CacheKey, compute_cache_key
from worker.context import WorkerContext


class Stopped(Exception):
    """What a check raises."""


def stop() -> None:
    raise Stopped


def go_on() -> None:
    pass


def settle(folder: Path) -> None:
    """Wait until no file is so young that its ctime may not show its next change."""
    newest = max(path.stat().st_ctime for path in folder.rglob("*"))
    time.sleep(max(0.0, newest + cache_key._SETTLED_SECONDS + 0.05 - time.time()))


@pytest.fixture
def dataset(tiny_texts: Path) -> DatasetSpec:
    return DatasetSpec(path=str(tiny_texts))


@pytest.fixture
def job(worker: WorkerContext, submit: Submit, tiny_texts: Path) -> Job:
    job_id = submit(dataset=str(tiny_texts))
    with worker.database.read() as session:
        return session.get_one(Job, job_id)


def find(worker: WorkerContext, job: Job, dataset: DatasetSpec | None) -> CacheKey:
    return compute_cache_key(worker.database, job, dataset, go_on)


def test_files_are_read_once(worker: WorkerContext, job: Job, dataset: DatasetSpec, tiny_llama: Path) -> None:
    settle(tiny_llama)
    first = find(worker, job, dataset)
    assert first.value is not None
    assert first.is_current()
    assert compute_cache_key(worker.database, job, dataset, stop) == first


def test_reading_can_be_stopped(worker: WorkerContext, job: Job, dataset: DatasetSpec) -> None:
    with pytest.raises(Stopped):
        compute_cache_key(worker.database, job, dataset, stop)


def test_a_file_that_was_just_written_is_read_again(
    worker: WorkerContext, job: Job, tmp_path: Path, tiny_texts: Path
) -> None:
    texts = Path(shutil.copy(tiny_texts, tmp_path))
    dataset = DatasetSpec(path=str(texts))
    first = find(worker, job, dataset)
    assert first.value is not None
    with worker.database.read() as session:
        assert session.get(FileDigest, first.stamps["/dataset"]) is None
    with pytest.raises(Stopped):
        compute_cache_key(worker.database, job, dataset, stop)


def test_a_change_shows_although_size_and_mtime_stay(
    worker: WorkerContext, job: Job, tmp_path: Path, tiny_texts: Path
) -> None:
    texts = Path(shutil.copy(tiny_texts, tmp_path))
    dataset = DatasetSpec(path=str(texts))
    first = find(worker, job, dataset)
    before = texts.stat()
    content = texts.read_text()
    time.sleep(0.02)
    texts.write_text(content.replace("a", "b", 1))
    os.utime(texts, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (texts.stat().st_size, texts.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not first.is_current()
    assert find(worker, job, dataset).value != first.value


def test_a_file_that_changes_while_it_is_read_tells_nothing(
    worker: WorkerContext, job: Job, tmp_path: Path, tiny_texts: Path
) -> None:
    texts = Path(shutil.copy(tiny_texts, tmp_path))

    def change() -> None:
        texts.write_text("other text\n" * 1000)

    found = compute_cache_key(worker.database, job, DatasetSpec(path=str(texts)), change)
    assert found.value is None


def test_a_source_that_is_gone_is_for_the_engine_to_tell(
    worker: WorkerContext, job: Job, tmp_path: Path
) -> None:
    assert find(worker, job, DatasetSpec(path=str(tmp_path / "gone.jsonl"))).value is None
    job.source = str(tmp_path / "gone")
    assert find(worker, job, None).value is None


def test_what_lies_elsewhere_has_its_commit(worker: WorkerContext, job: Job) -> None:
    keys = []
    for source in ("owner/name@" + "a" * 40, "owner/name@" + "b" * 40):
        for revision in ("c" * 40, "d" * 40):
            job.source = source
            found = compute_cache_key(worker.database, job, DatasetSpec(hub=f"owner/data@{revision}"), stop)
            assert not found.files
            keys.append(found.value)
    assert len(set(keys)) == 4
    assert None not in keys


def test_an_object_in_s3_is_known_once_it_is_pinned(worker: WorkerContext, job: Job) -> None:
    job.source = "owner/name@" + "a" * 40
    assert find(worker, job, DatasetSpec(s3="s3://texts/a.jsonl")).value is None
    assert find(worker, job, DatasetSpec(s3="s3://texts/a.jsonl", etag="0")).value is not None
