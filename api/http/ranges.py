"""HTTP ranges of bytes (RFC 9110, section 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from api.errors import BadRange

_ONE_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class ByteRange:
    """Bytes first to last, both included, of `size`."""

    first: int
    last: int
    size: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    @property
    def content_range(self) -> str:
        return f"bytes {self.first}-{self.last}/{self.size}"


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The one range that a Range header asks for, cut to the file's size.

    None: send everything. So it is without a header, in another unit, when malformed, and for several ranges
    at once, which a server may answer in full.

    Raises:
        BadRange: `range_not_satisfiable`: it begins after the end.
    """
    match = _ONE_RANGE.fullmatch(header or "")
    if match is None or match[0].strip().endswith("=-"):
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        start, stop = max(0, size - int(last)), size - 1
        unsatisfiable = int(last) == 0 or size == 0
    else:
        start, stop = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < int(first):
            return None
        unsatisfiable = start >= size
    if unsatisfiable:
        raise BadRange(
            "range_not_satisfiable",
            f"The file has {size} bytes.",
            "Ask for a range that begins before its end.",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return ByteRange(start, stop, size)
