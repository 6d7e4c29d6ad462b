"""Tensors from safetensors files into memory of our own, made where they are stored in another form.

Files are read with pread, never mapped: mapped pages would count in the process's memory and could change
under our feet. A file is open only while its tensors are read, and must still be the one that was planned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from compression.checkpoint.headers import Checkpoint, open_regular
from compression.checkpoint.tensors import (
    BlockScaledWeight,
    FileStamp,
    StackedWeight,
    StoredTensor,
    TensorInfo,
)
from compression.errors import SourceError

CHUNK_BYTES = 8 << 20

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""safetensors' names of the dtypes that torch has one element a number for."""


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint on the CPU, in the dtype that it says, in memory that nothing else holds.

    Raises:
        KeyError: a name that the checkpoint does not have.
        SourceError: `source_changed`, `source_unreadable`, `unsupported_dtype`.
    """
    tensors = {name: checkpoint.tensors[name] for name in names}
    stored = read_infos(tensor for tensor in tensors.values() if isinstance(tensor, TensorInfo))
    return {
        name: stored[tensor.name] if isinstance(tensor, TensorInfo) else make(tensor)
        for name, tensor in tensors.items()
    }


def read_infos(infos: Iterable[TensorInfo]) -> dict[str, Tensor]:
    """The same for tensors of any files, by their names on disk and as they lie there, in the order of file
    and place in it."""
    ordered = sorted(infos, key=lambda info: (info.file, info.begin, info.end))
    tensors = {}
    for _, group in groupby(ordered, key=lambda info: info.file):
        members = list(group)
        with open_unchanged(members[0]) as descriptor:
            for info in members:
                tensors[info.name] = _read(descriptor, info)
    return tensors


def same_data(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are the same bytes on disk; no more than a chunk of each is in memory.

    Tensors that are stored in another form are not compared, and differ.
    """
    if not isinstance(one, TensorInfo) or not isinstance(other, TensorInfo) or one.spec != other.spec:
        return False
    with open_unchanged(one) as left, open_unchanged(other) as right:
        for done in range(0, one.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, one.nbytes - done)
            parts = (bytearray(size), bytearray(size))
            read_into(left, memoryview(parts[0]), one.begin + done, one)
            read_into(right, memoryview(parts[1]), other.begin + done, other)
            if parts[0] != parts[1]:
                return False
    return True


def make(tensor: StackedWeight | BlockScaledWeight) -> Tensor:
    """A tensor that is stored in another form. Raises what `read_tensors` raises."""
    return _unstacked(tensor) if isinstance(tensor, StackedWeight) else _dequantized(tensor)


@contextmanager
def open_unchanged(info: TensorInfo) -> Iterator[int]:
    """A descriptor of the tensor's file, which is the planned one at the beginning and at the end."""
    with open_regular(info.file) as descriptor:
        _check_stamp(info, descriptor)
        yield descriptor
        _check_stamp(info, descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int, info: TensorInfo) -> None:
    """Fill the buffer with the file's bytes from `offset` on."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + CHUNK_BYTES]], offset + done)
        except OSError as error:
            message = f"{info.file.name} cannot be read: {error.strerror}."
            raise SourceError("source_unreadable", message) from error
        if count == 0:
            raise _source_changed(info)
        done += count


def _unstacked(weight: StackedWeight) -> Tensor:
    """Only this linear's part of each row of the stack is read."""
    stack, dtype = weight.stack, TORCH_DTYPES[weight.dtype]
    rows, width = stack.shape[1], stack.shape[2] * dtype.itemsize
    first = stack.begin + weight.expert * rows * width + weight.begin * dtype.itemsize
    part = weight.out * dtype.itemsize
    storage = torch.empty(rows * part, dtype=torch.uint8)
    buffer = storage.numpy().data
    with open_unchanged(stack) as descriptor:
        if part == width:
            read_into(descriptor, buffer, first, stack)
        else:
            for row in range(rows):
                read_into(descriptor, buffer[row * part : (row + 1) * part], first + row * width, stack)
    return storage.view(dtype).reshape(rows, weight.out).t().contiguous()


def _dequantized(weight: BlockScaledWeight) -> Tensor:
    """Codes times scales in float32, one row of blocks after the other."""
    codes, scales = (read_infos([info])[info.name] for info in (weight.codes, weight.scales))
    (rows, columns), dtype = weight.block, TORCH_DTYPES[weight.dtype]
    parts = [
        (part.float() * scale.repeat_interleave(columns)[: part.shape[1]]).to(dtype)
        for part, scale in zip(torch.split(codes, rows), scales.float(), strict=True)
    ]
    return torch.cat(parts)


def _read(descriptor: int, info: TensorInfo) -> Tensor:
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is None:
        raise SourceError("unsupported_dtype", f"{info.name} is {info.dtype}, which torch has no type for.")
    storage = torch.empty(info.nbytes, dtype=torch.uint8)
    read_into(descriptor, storage.numpy().data, info.begin, info)
    return storage.view(dtype).reshape(info.shape)


def _check_stamp(info: TensorInfo, descriptor: int) -> None:
    if FileStamp.of(descriptor) != info.stamp:
        raise _source_changed(info)


def _source_changed(info: TensorInfo) -> SourceError:
    return SourceError(
        "source_changed",
        f"{info.file.name} is no longer the file that was planned.",
        "Leave a model's files alone while it is compressed, and submit the job again.",
    )
