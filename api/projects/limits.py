"""What a project may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from api.settings import Settings


class OwnLimits(Protocol):
    """A project's own limits. None: the setting of that name holds."""

    @property
    def max_queued(self) -> int | None: ...

    @property
    def max_running(self) -> int | None: ...

    @property
    def max_body_bytes(self) -> int | None: ...

    @property
    def requests_per_minute(self) -> int | None: ...


@dataclass(frozen=True)
class Limits:
    """The limits that hold for a project: its own, else the settings'. None: no limit."""

    max_queued: int | None
    max_running: int | None
    max_body_bytes: int
    requests_per_minute: int | None

    @classmethod
    def of(cls, project: OwnLimits, settings: Settings) -> Self:
        """From the project's row and the settings. The smaller of the two body limits holds."""
        return cls(
            max_queued=_own_or(project.max_queued, settings.max_queued),
            max_running=_own_or(project.max_running, settings.max_running),
            max_body_bytes=min(
                size for size in (project.max_body_bytes, settings.max_body_bytes) if size is not None
            ),
            requests_per_minute=_own_or(project.requests_per_minute, settings.requests_per_minute),
        )


def _own_or(own: int | None, default: int | None) -> int | None:
    return default if own is None else own
