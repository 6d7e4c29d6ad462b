"""Places in lists that are ordered by (created_at, id), and how callers carry them from page to page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from api.errors import Unprocessable
from compression.errors import Problem


class ListedRow(Protocol):
    """A row of such a list."""

    @property
    def created_at(self) -> datetime: ...

    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Position:
    """The place of one item."""

    created_at: datetime
    id: str

    def to_cursor(self) -> str:
        """The text that a caller sends to get the page after this position."""
        text = f"{self.created_at.isoformat()} {self.id}"
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def of_cursor(cls, cursor: str) -> Position:
        """The position that `to_cursor` wrote.

        Raises:
            Unprocessable: `bad_cursor`.
        """
        try:
            text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
            created_at, item_id = text.split(" ")
            moment = datetime.fromisoformat(created_at)
            if moment.tzinfo is None or "\0" in item_id:
                raise ValueError("a cursor's time has a zone, and its id could be one")
            moment = moment.astimezone(UTC)
        except (binascii.Error, OverflowError, ValueError) as error:
            message = "This is not a cursor of this list."
            raise Unprocessable(Problem("bad_cursor", message, "Pass next_cursor as it came.")) from error
        return cls(moment, item_id)


def next_cursor(found: Sequence[ListedRow], limit: int) -> str | None:
    """The cursor of the next page. found: at most `limit` + 1 rows; None if there are not more than
    `limit`."""
    if len(found) <= limit:
        return None
    last = found[limit - 1]
    return Position(last.created_at, last.id).to_cursor()
