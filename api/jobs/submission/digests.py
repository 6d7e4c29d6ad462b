"""Digests of files that were read once, so that a job's cache key can be made without reading them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from api import database
from api.jobs.ledger.models import FileDigest, Job
from api.jobs.submission.cache_keys import cache_key
from api.jobs.submission.planning import PlannedJob

REMEMBERED_DAYS = 30
"""How long a digest is known. Then the file is read once more."""
_AT_ONCE = 10_000  # SQLite takes 32,766 parameters in a statement, PostgreSQL 65,535


def known(session: Session, stamps: Collection[str]) -> dict[str, str]:
    """The digests that are known of the files with these stamps, by stamp."""
    ordered, digests = sorted(stamps), dict[str, str]()
    for start in range(0, len(ordered), _AT_ONCE):
        some = FileDigest.stamp.in_(ordered[start : start + _AT_ONCE])
        rows = session.execute(select(FileDigest.stamp, FileDigest.sha256).where(some))
        digests |= {row.stamp: row.sha256 for row in rows}
    return digests


def set_cache_keys(session: Session, planned: Sequence[tuple[Job, PlannedJob]]) -> None:
    """Set the cache key of each job the digests of whose files are all known. The others get theirs from the
    worker, which reads the files."""
    stamps_of_all = {stamp for _, each in planned for stamp in (each.shared.stamps or {}).values()}
    digests = known(session, stamps_of_all)
    for job, each in planned:
        stamps = each.shared.stamps
        if stamps is not None and digests.keys() >= set(stamps.values()):
            of_files = {name: digests[stamp] for name, stamp in stamps.items()}
            job.cache_key = cache_key(job, each.dataset, of_files)


def remember(session: Session, digests: Mapping[str, str]) -> None:
    """Store digests by their files' stamps."""
    database.lock(session, "file digests")  # two may have read the same file
    already = known(session, digests)
    at = database.now(session)
    session.add_all(
        FileDigest(stamp=stamp, sha256=sha256, at=at)
        for stamp, sha256 in digests.items()
        if stamp not in already
    )
    session.flush()


def forget_old(session: Session, limit: int) -> int:
    """Remove at most `limit` digests that are older than REMEMBERED_DAYS: most of those files have another
    stamp by now. Returns how many."""
    cutoff = database.now(session) - timedelta(days=REMEMBERED_DAYS)
    old = select(FileDigest.stamp).where(FileDigest.at < cutoff).limit(limit)
    forgotten = session.execute(
        delete(FileDigest).where(FileDigest.stamp.in_(old)).returning(FileDigest.stamp)
    )
    return len(forgotten.all())
