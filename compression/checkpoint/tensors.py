"""The tensors of a checkpoint: where each lies, and how those are made that lie there in another form.

Each has a name, a dtype and a shape before anything is read; reader.py makes it. Most are stored as they are.
Two kinds are not, and are made one at a time when they are wanted:

    gate_up_proj [experts, in, 2 x out]   ─▶   experts.0.gate_proj.weight [out, in], ...    StackedWeight
    weight fp8, weight_scale_inv          ─▶   weight bfloat16                              BlockScaledWeight
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compression.checkpoint.layout import TensorSpec


class FileStamp(NamedTuple):
    """What tells that a file is still the one whose header was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: bytes [begin, end) of `file`, which had `stamp` when its header was read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    stamp: FileStamp

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)


@dataclass(frozen=True)
class MadeTensor(ABC):
    """A tensor that is made of others on disk."""

    name: str

    @property
    @abstractmethod
    def spec(self) -> TensorSpec: ...

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True)
class StackedWeight(MadeTensor):
    """The weight [out, in] of a linear of one expert, in a stack [experts, in, outputs of several linears].

    It lies there transposed: its outputs are the columns [begin, begin + out) of the expert's matrix.
    """

    stack: TensorInfo
    expert: int
    begin: int
    out: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.stack.dtype, (self.out, self.stack.shape[1]))


@dataclass(frozen=True)
class BlockScaledWeight(MadeTensor):
    """A weight [out, in]: fp8 codes times a scale for each block of rows and columns, rounded to a dtype.

    scales: [ceil(out / rows), ceil(in / columns)].
    """

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]
    rounded_to: str

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.rounded_to, self.codes.shape)


StoredTensor = TensorInfo | StackedWeight | BlockScaledWeight
