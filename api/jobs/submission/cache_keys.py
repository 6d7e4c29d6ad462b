"""Cache keys: a hash of all that a job's result depends on. Jobs of one project with one key get one result.

    model      its commit on the Hub, its revision in S3, or the digests of the files that are read and
               copied; its name, which the model card has
    dataset    its commit on the Hub, its etag in S3, its texts, or the digest of its file; which column
    recipe, calibration, evaluation, quality gate    as they are stored, every default written out
    engine     its version

The device is no part of the key: it changes the last bits of a result, not what the result is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api.jobs.ledger.models import Job
from compression.checkpoint.headers import Checkpoint
from compression.recipe import DatasetSpec
from compression.version import VERSION

_DATASET = "/dataset"  # names of the model's files are relative
_CARD = "README.md"
_CONFIG = "config.json"


def is_local(source: str) -> bool:
    """Whether a job's model is a folder on this machine, and not on the Hub or in S3."""
    return source.startswith("/")


def files_of(checkpoint: Checkpoint | None, dataset: DatasetSpec | None) -> dict[str, Path]:
    """The files on this machine that a job's result depends on, by the names that they have in its key.

    checkpoint: the model's, if that is a folder on this machine.
    """
    files: dict[str, Path] = {}
    if checkpoint is not None:
        files = dict(zip(checkpoint.weight_names, checkpoint.weight_files, strict=True))
        card = [_CARD] if (checkpoint.folder / _CARD).exists() else []
        for name in (_CONFIG, *checkpoint.other_files, *card):
            files[name] = checkpoint.folder / name
    if dataset is not None and dataset.path is not None:
        files[_DATASET] = Path(dataset.path)
    return files


def stamp(path: Path) -> str:
    """A file's stamp, which changes when the file does: a hash of its path, inode, size, mtime and ctime.

    Raises OSError where there is no such file.
    """
    path = path.resolve()
    status = path.stat()
    parts = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _hash(parts)


def stamps_of(files: Mapping[str, Path]) -> dict[str, str]:
    """The stamp of each file, by name."""
    return {name: stamp(path) for name, path in files.items()}


def cache_key(job: Job, dataset: DatasetSpec | None, digests: Mapping[str, str]) -> str | None:
    """A job's cache key. dataset: with what is pinned of it by now. digests: sha256 of the files that
    `files_of` named. None for a dataset in S3 whose version is not pinned yet."""
    if dataset is not None and dataset.s3 is not None and dataset.etag is None:
        return None
    content: Any = dataset and dataset.model_dump(mode="json")
    if dataset is not None and dataset.path is not None:
        content["path"] = [digests[_DATASET], Path(dataset.path).suffix.lower()]
    work = {
        "model": {name: sha256 for name, sha256 in digests.items() if name != _DATASET},
        "name": Path(job.source).name if is_local(job.source) else job.source,
        "dataset": content,
        "recipe": job.recipe,
        "calibration": job.calibration,
        "evaluation": job.evaluation,
        "quality_gate": job.quality_gate,
        "engine": VERSION,
    }
    return _hash(work)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
