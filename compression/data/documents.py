"""The dataset as a sequence of documents: a .jsonl, .parquet, .csv or .txt file, or texts of the request.

A file is read once to check every row and to note where the documents are; after that only those that are
drawn are read again. So memory does not grow with the file. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Protocol

from compression.boundary import foreign, parse_json, reason, writing
from compression.data.columns import Column, Document, invalid, json_name
from compression.data.tables import csv_documents, parquet_documents
from compression.errors import SourceError
from compression.recipe import DATASET_SUFFIXES, DatasetSpec


class Documents(Sequence[Document]):
    """Documents, and what each is called for people."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The row or line of a document in its file: "Line 3"."""


def open_documents(dataset: DatasetSpec) -> Documents:
    """The documents that are not empty, in the order of the dataset.

    Raises SourceError: dataset_not_found, dataset_format_unsupported, dataset_invalid (with the line or row),
    text_column_missing, dataset_empty.
    """
    documents: Documents
    if dataset.texts is not None:
        documents = _Texts(dataset.texts)
    else:
        assert dataset.path is not None  # what was fetched is a file
        documents = _open_file(Path(dataset.path), Column(dataset.text_column, dataset.messages_column))
    if not documents:
        raise SourceError("dataset_empty", "The dataset holds no text.", "Give at least one document.")
    return documents


def dataset_digest(dataset: DatasetSpec) -> str:
    """sha256 (hex) of the documents as bytes and of how they are read; where the file lies plays no part.

    Documents that the model writes are decided by what else is in a work key.

    Raises SourceError: dataset_not_found, dataset_format_unsupported.
    """
    if dataset.texts is not None:
        kind, content = "texts", hashlib.sha256(json.dumps(dataset.texts).encode()).hexdigest()
    elif dataset.generated:
        kind, content = "generated", None
    else:
        path = _existing(Path(dataset.path or ""))
        kind = path.suffix.lower()
        with _reading(path), path.open("rb") as file:
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


class _Texts(Documents):
    """Texts of a request."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index][1]

    def where(self, index: int) -> str:
        return f"Text {self._texts[index][0]}"


class _FileDocuments(Documents):
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
        with _reading(self._path), self._path.open("rb") as file:
            file.seek(begin)
            raw = file.read(end - begin)
        document = self._form.parse(raw, self._lines[index])
        if document is None:
            raise SourceError("dataset_changed", f"{self._path.name} changed while it was read.")
        return document

    def where(self, index: int) -> str:
        return f"Line {self._lines[index]}"


class _JSONLines:
    """One JSON object a line; the text, or the messages, in one of its fields."""

    def __init__(self, column: Column) -> None:
        self._column = column

    def spans(self, lines: Iterator[bytes]) -> Iterator[tuple[int, int, int]]:
        begin = 0
        for number, raw in enumerate(lines, 1):
            end = begin + len(raw)
            if raw.strip() and self.parse(raw, number) is not None:
                yield number, begin, end
            begin = end

    def parse(self, raw: bytes, line: int) -> Document | None:
        where = f"Line {line}"
        try:
            row = parse_json(raw)
        except ValueError as error:  # UnicodeDecodeError is one
            raise invalid(where, f"is not JSON that can be read: {reason(error)}") from None
        if not isinstance(row, dict):
            raise invalid(where, f"holds {json_name(row)}, not an object")
        return self._column.document(row, where)


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


class _SpooledDocuments(Documents):
    """Documents of a format in which no row can be read alone, copied to a file that has no name.

    documents: with the number of the row or line of each. unit: what is counted, "Row" or "Line".
    """

    def __init__(self, documents: Iterable[tuple[int, Document]], unit: str) -> None:
        self._unit = unit
        self._numbers, self._ends = array("Q"), array("Q", [0])
        copy = Path(tempfile.gettempdir(), "a copy of the dataset's text")
        with writing(copy):
            self._descriptor, name = tempfile.mkstemp()
            weakref.finalize(self, os.close, self._descriptor)
            os.unlink(name)
        with open(self._descriptor, "wb", closefd=False) as file:
            for number, document in documents:
                with foreign("dataset_invalid", f"{unit} {number} of the dataset is not text"):
                    line = json.dumps(document).encode()
                with writing(copy):
                    self._ends.append(self._ends[-1] + file.write(line))
                self._numbers.append(number)
            with writing(copy):
                file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        begin, end = self._ends[index], self._ends[index + 1]
        return json.loads(os.pread(self._descriptor, end - begin, begin))

    def where(self, index: int) -> str:
        return f"{self._unit} {self._numbers[index]}"


def _open_file(path: Path, column: Column) -> Documents:
    suffix = _existing(path).suffix.lower()
    with _reading(path):
        path.open("rb").close()  # pyarrow says of a file without permission that it is no Parquet file
        match suffix:
            case ".jsonl":
                return _FileDocuments(path, _JSONLines(column))
            case ".parquet":
                return _SpooledDocuments(parquet_documents(path, column), "Row")
            case ".csv":
                return _SpooledDocuments(csv_documents(path, column), "Line")
            case _:
                return _FileDocuments(path, _Paragraphs())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file cannot be read. Raises SourceError: dataset_not_found."""
    try:
        yield
    except OSError as error:
        raise SourceError("dataset_not_found", f"{path} cannot be read: {reason(error)}.") from error


def check_format(path: PurePath) -> None:
    """Raises SourceError: dataset_format_unsupported."""
    if path.suffix.lower() not in DATASET_SUFFIXES:
        raise SourceError(
            "dataset_format_unsupported",
            f"{path.name} is not a {', '.join(DATASET_SUFFIXES[:-1])} or {DATASET_SUFFIXES[-1]} file.",
            "Write one JSON object a line to a .jsonl file, or plain text to a .txt file.",
        )


def _existing(path: Path) -> Path:
    check_format(path)
    with _reading(path):
        exists = path.is_file()
    if not exists:
        raise SourceError("dataset_not_found", f"There is no dataset file {path}.")
    return path


def _decoded(raw: bytes, line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"Line {line}", f"is not UTF-8: {error.reason}") from None
