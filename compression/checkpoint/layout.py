"""The safetensors format: 8 bytes of header length (little endian), a JSON header, then the tensors' bytes.

Sizes and headers are computed here without torch, so that a plan knows the exact size of a file that is not
written yet. `build_header` gives the same bytes as the safetensors library does for the same tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import NamedTuple

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits an element, in the library's order: it stores tensors by falling dtype, then by name."""

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


class TensorSpec(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        return self.elements * DTYPE_BITS[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data; sub-byte types are packed."""
        return self.bits // 8


def build_header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, tuple[str, ...]]:
    """The bytes before the data (length and padded JSON), and the names in the order their data follows."""
    order = tuple(sorted(specs, key=lambda name: (-_RANK[specs[name].dtype], name)))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        end = begin + specs[name].nbytes
        header[name] = {
            "dtype": specs[name].dtype,
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def file_size(specs: Mapping[str, TensorSpec]) -> int:
    """Exact size in bytes of the safetensors file that holds these tensors."""
    header, _ = build_header(specs)
    return len(header) + sum(spec.nbytes for spec in specs.values())
