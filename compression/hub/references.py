"""Names on the Hub: `owner/name` or `owner/name@revision`, a revision being a branch, a tag or a commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Self

Kind = Literal["model", "dataset"]

DEFAULT_REVISION = "main"
_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,254}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubRef:
    """A repository on the Hub at a revision."""

    id: str
    revision: str = DEFAULT_REVISION

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The reference that a text is, None for what is none: a path, say."""
        id, at, revision = text.partition("@")
        good = _is_safe(_ID, id) and (not at or _is_safe(_REVISION, revision))
        return cls(id, revision or DEFAULT_REVISION) if good else None

    @property
    def name(self) -> str:
        """The id without its owner."""
        return self.id.partition("/")[2]

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> Self:
        """The same repository at a commit."""
        return type(self)(self.id, commit)

    def __str__(self) -> str:
        return self.id if self.revision == DEFAULT_REVISION else f"{self.id}@{self.revision}"


def is_commit(text: str) -> bool:
    """Whether a text is a commit's hash."""
    return _COMMIT.fullmatch(text) is not None


def _is_safe(pattern: re.Pattern[str], text: str) -> bool:
    """No part leads anywhere: ids and revisions become parts of URLs and of paths."""
    return pattern.fullmatch(text) is not None and ".." not in text and "//" not in text
