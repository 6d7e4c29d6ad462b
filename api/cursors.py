"""Cursors of lists that are ordered by (created_at, id)."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from api.errors import Unprocessable
from compression.errors import Problem


@dataclass(frozen=True)
class Position:
    """A place in such a list."""

    created_at: datetime
    id: str

    @classmethod
    def of_cursor(cls, cursor: str) -> Self:
        """The place that a cursor names.

        Raises:
            Unprocessable: `bad_cursor`.
        """
        try:
            text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
            created_at, row_id = text.split(" ")
            moment = datetime.fromisoformat(created_at)
            if moment.tzinfo is None:
                raise ValueError("a cursor's time has a zone")
        except (binascii.Error, ValueError) as error:
            message = "This is not a cursor of this list."
            raise Unprocessable(Problem("bad_cursor", message, "Pass next_cursor as it came.")) from error
        return cls(moment, row_id)

    def cursor(self) -> str:
        """What a caller sends to go on after this place."""
        text = f"{self.created_at.isoformat()} {self.id}"
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
