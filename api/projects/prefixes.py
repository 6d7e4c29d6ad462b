"""Where in S3 a project may read models and text, and write checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compression.s3.client import S3Ref


@dataclass(frozen=True)
class S3Access:
    """Prefixes are `s3://bucket` or `s3://bucket/folder`, and hold for whole parts of a key.

    store_url: where the service keeps its own files, in S3 or not. No project may name what is there.
    reads, writes: where the project may read and write. others: where other projects write, and this one may
    not read.
    """

    store_url: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def _closed(self) -> tuple[str, ...]:
        return (self.store_url, *self.others)

    def may_read(self, ref: S3Ref) -> bool:
        """Whether the project may name this object as text, or this folder as a model."""
        return _is_in(str(ref), self.reads) and not _is_in(str(ref), self._closed)

    def may_write(self, prefix: str) -> bool:
        """Whether the project may have files written below this prefix."""
        return _is_in(prefix, self.writes) and not any(overlap(prefix, each) for each in self._closed)


def overlap(one: str, other: str) -> bool:
    """Whether one of two prefixes lies in the other."""
    return _is_in(one, (other,)) or _is_in(other, (one,))


def _is_in(place: str, prefixes: Iterable[str]) -> bool:
    return any(f"{place}/".startswith(f"{prefix.rstrip('/')}/") for prefix in prefixes)
