"""Which work a claimed job is: the digests of its files, those that are not known read here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from api.database import Database
from api.jobs.ledger.models import Job
from api.jobs.submission import digests
from api.jobs.submission.cache_keys import cache_key, files_of, is_local, stamp, stamps_of
from api.store.base import Check, sha256_of
from compression.checkpoint.headers import read_checkpoint
from compression.errors import SourceError
from compression.recipe import DatasetSpec

_SETTLED_SECONDS = 2.0  # a later change shows in the ctime, however coarse the file system's clock


@dataclass(frozen=True)
class Identity:
    """key: of the job's work; None where it cannot be told. files, stamps: what it was told by."""

    key: str | None
    files: Mapping[str, Path] = field(default_factory=dict)
    stamps: Mapping[str, str] = field(default_factory=dict)

    def holds(self) -> bool:
        """Whether the files are still what they were."""
        try:
            return stamps_of(self.files) == self.stamps
        except OSError:
            return False


def identify(database: Database, job: Job, dataset: DatasetSpec | None, check: Check) -> Identity:
    """Which work a job is. Reads files whose digests are not known, and remembers these.

    dataset: as far as it is pinned by now. check: whatever it raises ends the reading. A source that is gone
    is for the engine to tell.
    """
    try:
        checkpoint = read_checkpoint(job.source) if is_local(job.source) else None
        files = files_of(checkpoint, dataset)
        stamps = stamps_of(files)
        with database.read() as session:
            known = digests.known(session, stamps.values())
        settled = {}
        for name, path in files.items():
            if stamps[name] in known:
                continue
            is_settled = path.stat().st_ctime < time.time() - _SETTLED_SECONDS
            sha256 = known[stamps[name]] = sha256_of(path, check)
            if stamp(path) != stamps[name]:
                return Identity(None)
            if is_settled:
                settled[stamps[name]] = sha256
    except (OSError, SourceError):
        return Identity(None)
    if settled:
        with database.write() as session:
            digests.remember(session, settled)
    key = cache_key(job, dataset, {name: known[stamps[name]] for name in files})
    return Identity(key, files, stamps)
