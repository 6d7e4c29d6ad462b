"""What a dataset file may look like, and what is said about one that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compression.data.documents import dataset_digest, open_documents
from compression.errors import SourceError
from compression.recipe import DatasetSpec


def spec(path: Path, content: str | bytes, **columns: str) -> DatasetSpec:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DatasetSpec(path=str(path), **columns)


def refused(dataset: DatasetSpec) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_documents(dataset)
    return caught.value


def test_jsonl_gives_its_text_column_in_order(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "text": f"Zeile {i}: ü"}, ensure_ascii=i % 2 == 0) for i in range(50)]
    documents = open_documents(spec(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [documents[i] for i in range(len(documents))] == [f"Zeile {i}: ü" for i in range(50)]


def test_blank_lines_blank_texts_and_nulls_are_no_documents(tmp_path: Path) -> None:
    content = '{"text": "one"}\n\n   \n{"text": ""}\n{"text": "  \\n"}\n{"text": null}\r\n{"text": "two"}'
    documents = open_documents(spec(tmp_path / "a.jsonl", content))
    assert list(documents) == ["one", "two"]


def test_byte_order_mark(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf"
    assert list(open_documents(spec(tmp_path / "a.jsonl", content + b'{"text": "one"}\n'))) == ["one"]
    assert list(open_documents(spec(tmp_path / "a.txt", content + b"one\ntwo\n\nthree"))) == [
        "one\ntwo",
        "three",
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "content": "c", "text": "t"}, "t"),
        ({"prompt": "p", "content": "c"}, "c"),
        ({"prompt": "p", "title": "x"}, "p"),
        ({"prompt": "p", "messages": [{"role": "user", "content": "p"}]}, [{"role": "user", "content": "p"}]),
    ],
)
def test_the_default_column(tmp_path: Path, row: dict[str, Any], expected: object) -> None:
    assert list(open_documents(spec(tmp_path / "a.jsonl", json.dumps(row)))) == [expected]


def test_a_named_column_wins(tmp_path: Path) -> None:
    row = json.dumps({"text": "t", "body": "b"})
    assert list(open_documents(spec(tmp_path / "a.jsonl", row, text_column="body"))) == ["b"]


def test_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    content = json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": []})
    documents = open_documents(spec(tmp_path / "a.jsonl", content, messages_column="messages"))
    assert list(documents) == [turns]


def test_two_columns_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="at most one of text_column and messages_column"):
        DatasetSpec(path="a.jsonl", text_column="text", messages_column="messages")


def test_text_files_split_at_blank_lines(tmp_path: Path) -> None:
    content = "\n\nfirst line\nsecond line\n\n \t\nnext\r\n\r\nlast"
    documents = open_documents(spec(tmp_path / "a.txt", content))
    assert list(documents) == ["first line\nsecond line", "next", "last"]


def test_inline_texts() -> None:
    assert list(open_documents(DatasetSpec(texts=("a", " ", "b")))) == ["a", "b"]


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    error = refused(spec(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}'))
    assert error.code == "text_column_missing"
    assert "'question', 'answer'" in error.message
    error = refused(spec(tmp_path / "a.jsonl", '{"text": "t"}\n{"body": "b"}'))
    assert error.code == "text_column_missing"
    assert "Line 2" in error.message
    assert "'body'" in error.message


@pytest.mark.parametrize(
    "line",
    [b'{"text": "cut', b'["text"]', b'{"text": 3}', b'{"text": ["a"]}', b'{"text": "\xff"}', b"plain words"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    error = refused(spec(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n'))
    assert error.code == "dataset_invalid"
    assert "Line 3 " in error.message


@pytest.mark.parametrize("value", ["Hi", ["Hi"], [{"content": "Hi"}], {"role": "user"}])
def test_bad_messages_are_named(tmp_path: Path, value: object) -> None:
    error = refused(spec(tmp_path / "a.jsonl", json.dumps({"chat": value}), messages_column="chat"))
    assert error.code == "dataset_invalid"
    assert "Line 1 " in error.message


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    error = refused(spec(tmp_path / "a.txt", "eins\n\nzwei\nfünf".encode("latin-1")))
    assert (error.code, "Line 4 " in error.message) == ("dataset_invalid", True)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": " "}\n'])
def test_nothing_in_it(tmp_path: Path, content: str) -> None:
    assert refused(spec(tmp_path / "a.jsonl", content)).code == "dataset_empty"
    assert refused(DatasetSpec(texts=("", " "))).code == "dataset_empty"


def test_no_file_or_another_kind_of_file(tmp_path: Path) -> None:
    assert refused(DatasetSpec(path=str(tmp_path / "none.jsonl"))).code == "dataset_not_found"
    (tmp_path / "folder.txt").mkdir()
    assert refused(DatasetSpec(path=str(tmp_path / "folder.txt"))).code == "dataset_not_found"
    error = refused(spec(tmp_path / "a.arrow", b"ARROW1"))
    assert (error.code, "a.arrow" in error.message) == ("dataset_format_unsupported", True)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    first = dataset_digest(spec(tmp_path / "a.jsonl", '{"text": "one"}'))
    assert dataset_digest(spec(tmp_path / "b.jsonl", '{"text": "one"}')) == first
    others = [
        spec(tmp_path / "c.jsonl", '{"text": "two"}'),
        spec(tmp_path / "d.jsonl", '{"text": "one"}', text_column="text"),
        spec(tmp_path / "e.txt", '{"text": "one"}'),
        DatasetSpec(texts=("one", "two")),
        DatasetSpec(texts=("onetwo",)),
        DatasetSpec(texts=("two", "one")),
    ]
    assert len({first, *map(dataset_digest, others)}) == 7
    with pytest.raises(SourceError, match=r"none\.jsonl"):
        dataset_digest(DatasetSpec(path=str(tmp_path / "none.jsonl")))


def test_reading_documents_needs_no_torch() -> None:
    unwanted = "'torch' in sys.modules or 'transformers' in sys.modules"
    code = f"import sys, compression.data.documents; sys.exit({unwanted})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
