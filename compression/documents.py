"""The dataset as a sequence of documents: a .jsonl or .txt file, or texts given in the request.

A file is read once to check every line and to note where the documents are; after that only those that are
drawn are read again. So memory does not grow with the file. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from compression.errors import SourceError
from compression.recipe import DatasetSpec

TEXT_COLUMNS = ("text", "content", "prompt")
"""Where a .jsonl file's text is looked for when no column is named; the first that exists."""

Messages = list[dict[str, Any]]
Document = str | Messages
"""Plain text, or the messages of one conversation."""


def open_documents(dataset: DatasetSpec) -> Sequence[Document]:
    """The documents that are not empty, in the order of the dataset.

    Raises SourceError: dataset_not_found, dataset_format_unsupported, dataset_invalid (with the line number),
    text_column_missing, dataset_empty.
    """
    documents: Sequence[Document]
    if dataset.texts is not None:
        documents = [text for text in dataset.texts if text.strip()]
    else:
        assert dataset.path is not None  # DatasetSpec: exactly one of the two
        documents = _open_file(Path(dataset.path), dataset)
    if not documents:
        raise SourceError("dataset_empty", "The dataset holds no text.", "Give at least one document.")
    return documents


def dataset_digest(dataset: DatasetSpec) -> str:
    """sha256 (hex) of the documents as bytes and of how they are read; where the file lies plays no part.

    Raises SourceError: dataset_not_found, dataset_format_unsupported.
    """
    if dataset.texts is not None:
        kind, content = "texts", hashlib.sha256(json.dumps(dataset.texts).encode()).hexdigest()
    else:
        path = _existing(Path(dataset.path or ""))
        kind = path.suffix.lower()
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {
        "kind": kind,
        "sha256": content,
        "text_column": dataset.text_column,
        "messages_column": dataset.messages_column,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class _Format(Protocol):
    """How one kind of file is cut into documents. `line` numbers start at 1."""

    def spans(self, lines: Iterator[bytes]) -> Iterator[tuple[int, int, int]]:
        """(line, begin, end) in bytes from the first line's start of each document that is not empty."""

    def parse(self, raw: bytes, line: int) -> Document | None:
        """The document in the bytes of one span; None where it is empty."""


class _FileDocuments(Sequence[Document]):
    """Documents of a file, read when they are asked for."""

    def __init__(self, path: Path, form: _Format) -> None:
        self._path = path
        self._form = form
        self._lines, self._begins, self._ends = array("Q"), array("Q"), array("Q")
        with path.open("rb") as file:
            mark = file.read(len(codecs.BOM_UTF8))
            start = len(mark) if mark == codecs.BOM_UTF8 else 0
            file.seek(start)
            for line, begin, end in form.spans(file):
                self._lines.append(line)
                self._begins.append(begin + start)
                self._ends.append(end + start)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        begin, end = self._begins[index], self._ends[index]
        with self._path.open("rb") as file:
            file.seek(begin)
            document = self._form.parse(file.read(end - begin), self._lines[index])
        if document is None:
            raise SourceError("dataset_changed", f"{self._path.name} changed while it was read.")
        return document


class _JSONLines:
    """One JSON object a line; the text, or the messages, in one of its fields."""

    def __init__(self, dataset: DatasetSpec) -> None:
        self._messages = dataset.messages_column is not None
        self._column = dataset.messages_column or dataset.text_column

    def spans(self, lines: Iterator[bytes]) -> Iterator[tuple[int, int, int]]:
        begin = 0
        for number, raw in enumerate(lines, 1):
            end = begin + len(raw)
            if raw.strip() and self.parse(raw, number) is not None:
                yield number, begin, end
            begin = end

    def parse(self, raw: bytes, line: int) -> Document | None:
        try:
            row = json.loads(raw)
        except ValueError as error:  # UnicodeDecodeError is one
            raise _invalid(line, f"is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise _invalid(line, f"holds {_json_name(row)}, not an object")
        column = self._column_of(row, line)
        value = row[column]
        if value is None:
            return None
        if self._messages:
            return _checked_messages(value, column, line)
        if not isinstance(value, str):
            raise _invalid(line, f"has {_json_name(value)}, not text, in {column!r}")
        return value if value.strip() else None

    def _column_of(self, row: dict[str, Any], line: int) -> str:
        """The column named in the request, or the first known one of the first row, for all rows."""
        if self._column is None:
            self._column = next((name for name in TEXT_COLUMNS if name in row), None)
        if self._column is None or self._column not in row:
            wanted = repr(self._column) if self._column else " or ".join(map(repr, TEXT_COLUMNS))
            there = ", ".join(map(repr, row)) or "none"
            raise SourceError(
                "text_column_missing",
                f"Line {line} of the dataset has no column {wanted}; it has {there}.",
                "Name the column with text_column, or messages_column for conversations.",
            )
        return self._column


class _Paragraphs:
    """Plain text, one document between two blank lines."""

    def spans(self, lines: Iterator[bytes]) -> Iterator[tuple[int, int, int]]:
        first, begin, position = 0, 0, 0
        for number, raw in enumerate(lines, 1):
            _decoded(raw, number)
            if raw.strip() and not first:
                first, begin = number, position
            elif not raw.strip() and first:
                yield first, begin, position
                first = 0
            position += len(raw)
        if first:
            yield first, begin, position

    def parse(self, raw: bytes, line: int) -> Document | None:
        return _decoded(raw, line).strip() or None


def _open_file(path: Path, dataset: DatasetSpec) -> Sequence[Document]:
    form = _JSONLines(dataset) if _existing(path).suffix.lower() == ".jsonl" else _Paragraphs()
    try:
        return _FileDocuments(path, form)
    except OSError as error:
        raise SourceError("dataset_not_found", f"{path} cannot be read: {error.strerror}.") from None


def _existing(path: Path) -> Path:
    if path.suffix.lower() not in (".jsonl", ".txt"):
        raise SourceError(
            "dataset_format_unsupported",
            f"{path.name} is neither a .jsonl nor a .txt file.",
            "Write one JSON object a line to a .jsonl file, or plain text to a .txt file.",
        )
    if not path.is_file():
        raise SourceError("dataset_not_found", f"There is no dataset file {path}.")
    return path


def _checked_messages(value: Any, column: str, line: int) -> Messages | None:
    good = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    if not good:
        raise _invalid(line, f"has no list of messages with roles in {column!r}")
    return value or None


def _decoded(raw: bytes, line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _invalid(line, f"is not UTF-8: {error.reason}") from None


def _invalid(line: int, what: str) -> SourceError:
    return SourceError("dataset_invalid", f"Line {line} of the dataset {what}.")


def _json_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
