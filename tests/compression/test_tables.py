"""Parquet and CSV files as datasets, and what is said about those that are wrong."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from compression.data.documents import dataset_digest, open_documents
from compression.errors import SourceError
from compression.recipe import DatasetSpec

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def parquet_file(path: Path, columns: dict[str, Any], **options: Any) -> str:
    parquet.write_table(arrow.table(columns), path, **options)
    return str(path)


def csv_file(path: Path, rows: list[list[str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def refused(path: str, **columns: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_documents(DatasetSpec(path=path, **columns))
    return caught.value


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.string_view()])
def test_parquet_text_in_order_and_at_random(tmp_path: Path, kind: arrow.DataType) -> None:
    texts = [f"Zeile {i}: ü" for i in range(1000)]
    column = arrow.array(texts, type=kind)
    path = parquet_file(tmp_path / "a.parquet", {"id": range(1000), "text": column}, row_group_size=300)
    documents = open_documents(DatasetSpec(path=path))
    assert [documents[i] for i in range(1000)] == texts
    assert [documents[i] for i in (999, 0, 500)] == [texts[999], texts[0], texts[500]]


def test_parquet_texts_of_a_dictionary(tmp_path: Path) -> None:
    column = arrow.array(["a", "b", "a"]).dictionary_encode()
    assert list(open_documents(DatasetSpec(path=parquet_file(tmp_path / "a.parquet", {"text": column})))) == [
        "a",
        "b",
        "a",
    ]


def test_nulls_and_blanks_are_no_documents(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "a.parquet", {"text": ["one", None, "", " \n", "two"]})
    assert list(open_documents(DatasetSpec(path=path))) == ["one", "two"]
    path = csv_file(tmp_path / "a.csv", [["text"], ["one"], [""], [" "], ["two"]])
    assert list(open_documents(DatasetSpec(path=path))) == ["one", "two"]


def test_parquet_messages_are_found_and_named(tmp_path: Path) -> None:
    with_tool = [*TURNS, {"role": "tool", "content": "3", "name": "add"}]
    columns = {"prompt": ["Hi", "x", "y"], "messages": [TURNS, [], with_tool]}
    path = parquet_file(tmp_path / "a.parquet", columns)
    assert list(open_documents(DatasetSpec(path=path))) == [TURNS, with_tool]
    assert list(open_documents(DatasetSpec(path=path, text_column="prompt"))) == ["Hi", "x", "y"]
    path = parquet_file(tmp_path / "b.parquet", {"chat": [TURNS]})
    assert list(open_documents(DatasetSpec(path=path, messages_column="chat"))) == [TURNS]


def test_csv_as_rfc_4180_has_it(tmp_path: Path) -> None:
    rows = [["id", "text"], ["1", 'two\nlines, a comma and "quotes"'], ["2", "x" * 200_000]]
    path = Path(csv_file(tmp_path / "a.csv", rows))
    assert list(open_documents(DatasetSpec(path=str(path)))) == [row[1] for row in rows[1:]]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(open_documents(DatasetSpec(path=str(path), text_column="id"))) == ["1", "2"]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_missing_column_names_those_there_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        csv_file(path, [["question", "answer"], ["q", "a"]])
    else:
        parquet_file(path, {"question": ["q"], "answer": ["a"]})
    for columns in ({}, {"text_column": "body"}):
        error = refused(str(path), **columns)
        assert error.code == "text_column_missing"
        assert "'question', 'answer'" in error.message


@pytest.mark.parametrize(
    ("column", "chosen", "said"),
    [
        ([1, 2], "text_column", "int64, not text"),
        (["Hi"], "messages_column", "string, not lists of messages"),
        ([["Hi"]], "messages_column", "not lists of messages"),
        ([[{"content": "Hi"}]], "messages_column", "Row 1 of the dataset has no list of messages with roles"),
    ],
)
def test_a_parquet_column_of_another_type(tmp_path: Path, column: list[Any], chosen: str, said: str) -> None:
    error = refused(parquet_file(tmp_path / "a.parquet", {"x": column}), **{chosen: "x"})
    assert error.code == "dataset_invalid"
    assert said in error.message


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    path = Path(parquet_file(tmp_path / "a.parquet", {"text": ["some text " * 50] * 100}))
    whole = path.read_bytes()
    for content in (b"", b"PAR1", b"plain words", whole[:-20], whole[:4] + b"\xff" * 40 + whole[44:]):
        path.write_bytes(content)
        error = refused(str(path))
        assert (error.code, "a.parquet" in error.message) == ("dataset_invalid", True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"id,text\n1,a\n2\n", "Line 3 of the dataset has 1 cells"),
        (b'id,text\n1,"two\nlines"\n2,b,c\n', "Line 4 of the dataset has 3 cells"),
        (b'text\n"open', "Line 2 of the dataset is not CSV"),
        (b"text\nfine\nf\xfcnf\n", "is not UTF-8"),
        (b"text,text\na,b\n", "names a column twice"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    error = refused(str(path))
    assert error.code == "dataset_invalid"
    assert said in error.message


def test_csv_holds_no_conversations(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "a.csv", [["messages"], ["[]"]])
    for columns in ({}, {"messages_column": "messages"}):
        error = refused(path, **columns)
        assert error.code == "dataset_invalid"
        assert "text_column" in error.hint


def test_nothing_in_it(tmp_path: Path) -> None:
    empty = arrow.array([], type=arrow.string())
    assert refused(parquet_file(tmp_path / "a.parquet", {"text": empty})).code == "dataset_empty"
    assert refused(parquet_file(tmp_path / "b.parquet", {"text": [None, ""]})).code == "dataset_empty"
    assert refused(csv_file(tmp_path / "a.csv", [["text"]])).code == "dataset_empty"
    assert refused(csv_file(tmp_path / "b.csv", [])).code == "dataset_empty"


def test_the_same_text_in_another_kind_of_file_is_another_dataset(tmp_path: Path) -> None:
    paths = [
        parquet_file(tmp_path / "a.parquet", {"text": ["one"]}),
        csv_file(tmp_path / "a.csv", [["text"], ["one"]]),
        csv_file(tmp_path / "b.csv", [["text"], ["two"]]),
    ]
    assert len({dataset_digest(DatasetSpec(path=path)) for path in paths}) == 3
