"""Ranges of bytes as RFC 9110 has them."""

from __future__ import annotations

import pytest

from api.errors import BadRange
from api.http.ranges import parse_range


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=2-5", 2, 5),
        ("bytes=7-", 7, 9),
        ("bytes=7-99", 7, 9),
        ("bytes=-3", 7, 9),
        ("bytes=-99", 0, 9),
        ("Bytes= 1 - 2 ", 1, 2),
    ],
)
def test_one_range(header: str, first: int, last: int) -> None:
    part = parse_range(header, 10)
    assert part is not None
    assert (part.first, part.last, part.length) == (first, last, last - first + 1)
    assert part.content_range == f"bytes {first}-{last}/10"


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-1,3-4", "bytes=--1"],
)
def test_what_asks_for_no_single_range_gets_everything(header: str | None) -> None:
    assert parse_range(header, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)]
)
def test_beyond_the_end(header: str, size: int) -> None:
    with pytest.raises(BadRange) as caught:
        parse_range(header, size)
    assert caught.value.headers == {"Content-Range": f"bytes */{size}"}
