"""Documents out of Parquet and CSV files, row after row. Neither torch nor pandas is imported here."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compression.boundary import foreign
from compression.data.columns import Column, Document, invalid, without_nulls
from compression.errors import SourceError

_ROWS_AT_ONCE = 256
_AGAIN = "Write it again."


def parquet_documents(path: Path, column: Column) -> Iterator[tuple[int, Document]]:
    """The documents of a Parquet file that are not empty, each with its row; only their column is read.

    Fields that a message does not have are null in Parquet; they are left out.

    Raises SourceError: text_column_missing, dataset_invalid.
    """
    import pyarrow.parquet as parquet

    with foreign("dataset_invalid", f"{path.name} of the dataset is no readable Parquet file", _AGAIN):
        schema = parquet.read_schema(path)
    name = column.choose(schema.names, path.name)
    if schema.names.count(name) > 1:
        raise invalid(path.name, f"has {schema.names.count(name)} columns {name!r}")
    _check_type(schema.field(name).type, name, path, column)
    for number, value in enumerate(_parquet_values(path, name), 1):
        document = column.document({name: without_nulls(value)}, f"Row {number}")
        if document is not None:
            yield number, document


def _parquet_values(path: Path, name: str) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with (
        foreign("dataset_invalid", f"{path.name} of the dataset is no readable Parquet file", _AGAIN),
        parquet.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        number = 0
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[name]):
            values = batch.column(0)
            try:
                yield from values.to_pylist()
            except ValueError:  # one of them is not UTF-8, say: which one
                for row, value in enumerate(values, number + 1):
                    with foreign("dataset_invalid", f"Row {row} of the dataset cannot be read", _AGAIN):
                        value.as_py()
                raise
            number += len(values)


def _check_type(found: Any, name: str, path: Path, column: Column) -> None:
    """Say at once what a column holds that cannot be text or messages."""
    from pyarrow import types

    if types.is_dictionary(found):
        found = found.value_type
    if column.holds_messages:
        nested = types.is_list(found) or types.is_large_list(found)
        good, wanted = nested and types.is_struct(found.value_type), "lists of messages"
    else:
        texts = (types.is_string, types.is_large_string, types.is_string_view)
        good, wanted = any(is_text(found) for is_text in texts), "text"
    if not good and not types.is_null(found):
        raise invalid(path.name, f"has {found}, not {wanted}, in {name!r}")


def csv_documents(path: Path, column: Column) -> Iterator[tuple[int, Document]]:
    """The documents of a CSV file (RFC 4180, UTF-8, a header in its first row) that are not empty, each with
    its first line.

    Raises SourceError: text_column_missing, dataset_invalid.
    """
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's 128 KB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, None)
            if header is None:
                return
            _check_header(header, column)
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    document = column.document(_row(header, cells, line), f"Line {line}")
                    if document is not None:
                        yield line, document
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise invalid(path.name, f"is not UTF-8 behind line {line}: {error.reason}") from None
        except csv.Error as error:
            raise invalid(f"Line {line}", f"is not CSV: {error}") from None


def _check_header(header: list[str], column: Column) -> None:
    if len(set(header)) != len(header):
        raise invalid("Line 1", "names a column twice")
    column.choose(header, "Line 1")
    if column.holds_messages:
        raise SourceError(
            "dataset_invalid",
            "A .csv file holds text only, no conversations.",
            "Write conversations to a .jsonl or .parquet file, or name the text with text_column.",
        )


def _row(header: list[str], cells: list[str], line: int) -> dict[str, str]:
    if len(cells) != len(header):
        raise invalid(f"Line {line}", f"has {len(cells)} cells; the header has {len(header)}")
    return dict(zip(header, cells, strict=True))
