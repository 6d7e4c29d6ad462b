"""Which column of a dataset's rows holds its text or its conversations, and what is said of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compression.errors import SourceError

KNOWN_COLUMNS = ("text", "content", "messages", "prompt")
"""Where documents are looked for when no column is named; the first that exists."""
MESSAGES = "messages"

Messages = list[dict[str, Any]]
Document = str | Messages
"""Plain text, or the messages of one conversation."""


class Column:
    """The column named in the request, or the first known one of the first row, for all rows.

    where: how a row is called in errors, such as "Line 3".
    """

    def __init__(self, text_column: str | None, messages_column: str | None) -> None:
        self._name = messages_column or text_column
        self._messages = messages_column is not None

    @property
    def holds_messages(self) -> bool:
        """Whether documents are conversations; settled by the first call of `choose`."""
        return self._messages

    def choose(self, there: Iterable[str], where: str) -> str:
        """The column's name.

        Raises SourceError: text_column_missing, with the columns there are.
        """
        there = list(there)
        if self._name is None:
            self._name = next((name for name in KNOWN_COLUMNS if name in there), None)
            self._messages = self._name == MESSAGES
        if self._name is None or self._name not in there:
            wanted = repr(self._name) if self._name else " or ".join(map(repr, KNOWN_COLUMNS))
            found = ", ".join(map(repr, there)) or "none"
            raise SourceError(
                "text_column_missing",
                f"{where} of the dataset has no column {wanted}; it has {found}.",
                "Name the column with text_column, or messages_column for conversations.",
            )
        return self._name

    def document(self, row: Mapping[str, Any], where: str) -> Document | None:
        """The row's document; None where it is empty.

        Raises SourceError: text_column_missing, dataset_invalid.
        """
        name = self.choose(row, where)
        value = row[name]
        if value is None:
            return None
        if self._messages:
            return _checked_messages(value, name, where)
        if not isinstance(value, str):
            raise invalid(where, f"has {json_name(value)}, not text, in {name!r}")
        return value if value.strip() else None


def invalid(where: str, what: str, hint: str = "") -> SourceError:
    """dataset_invalid: `what` is wrong with the row or line."""
    return SourceError("dataset_invalid", f"{where} of the dataset {what}.", hint)


def json_name(value: Any) -> str:
    """What kind of JSON a value is, for people."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def without_nulls(value: Any) -> Any:
    """Messages without the fields that they do not have: a table has every field in every row."""
    if not isinstance(value, list):
        return value
    return [
        {key: item for key, item in message.items() if item is not None}
        if isinstance(message, dict)
        else message
        for message in value
    ]


def _checked_messages(value: Any, column: str, where: str) -> Messages | None:
    good = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    if not good:
        raise invalid(where, f"has no list of messages with roles in {column!r}")
    return value or None
