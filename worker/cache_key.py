"""The cache key of a claimed job, for deduplication. Reads the files whose digests are not known."""

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
from worker.retry import write_with_retry

_SETTLED_SECONDS = 2.0
"""A file that changed so recently is read again next time: file systems with a coarse clock (2 s on FAT) may
not show a second change in its ctime."""


@dataclass(frozen=True)
class CacheKey:
    """Jobs with the same key get the same result.

    value: the key; None where it cannot be computed. files, stamps: the local files that it was computed
    from, by name, and what changes whenever one of them does.
    """

    value: str | None
    files: Mapping[str, Path] = field(default_factory=dict)
    stamps: Mapping[str, str] = field(default_factory=dict)

    def is_current(self) -> bool:
        """Whether the files are unchanged."""
        try:
            return stamps_of(self.files) == self.stamps
        except OSError:
            return False


def compute_cache_key(database: Database, job: Job, dataset: DatasetSpec | None, check: Check) -> CacheKey:
    """The cache key of a job. Digests that had to be computed are remembered in the database.

    A source that is gone or unreadable gives no key; the engine reports it.

    dataset: at the state that the job is pinned to by now. check: what it raises ends the reading.
    """
    try:
        checkpoint = read_checkpoint(job.source) if is_local(job.source) else None
        files = files_of(checkpoint, dataset)
        stamps = stamps_of(files)
        known = write_with_retry(database, lambda session: digests.known(session, stamps.values()), check)
        computed = {}
        for name, path in files.items():
            if stamps[name] in known:
                continue
            is_settled = path.stat().st_ctime < time.time() - _SETTLED_SECONDS
            sha256 = known[stamps[name]] = sha256_of(path, check)
            if stamp(path) != stamps[name]:  # it changed while it was read
                return CacheKey(None)
            if is_settled:
                computed[stamps[name]] = sha256
    except (OSError, SourceError):
        return CacheKey(None)
    if computed:
        write_with_retry(database, lambda session: digests.remember(session, computed), check)
    key = cache_key(job, dataset, {name: known[stamps[name]] for name in files})
    return CacheKey(key, files, stamps)
