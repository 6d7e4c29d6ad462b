"""Files that are either there and whole, or not there.

Each is written under a temporary name in its own folder, synced, renamed, and the folder synced. The
digest is taken on the way. Memory is bounded by one chunk, whatever is copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compression.boundary import foreign, writing
from compression.checkpoint.headers import (
    INDEX_FILE,
    Checkpoint,
    open_regular,
    read_header,
    resolve_inside,
)
from compression.checkpoint.layout import TensorSpec, build_header
from compression.checkpoint.reader import CHUNK_BYTES, TORCH_DTYPES, make, open_unchanged, read_into
from compression.checkpoint.tensors import StoredTensor, TensorInfo

TEMPORARY_SUFFIX = ".writing"
"""A file of this name is what a killed process left; writing the same file again replaces it."""

_LONGEST_NAME = 255
"""Bytes of a file's name on Linux."""

_SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, digest, size, tensors in the order of their data, and their bytes."""

    file: str
    sha256: str
    size: int
    tensors: tuple[str, ...]
    tensor_bytes: int


def write_shard(path: Path, tensors: Mapping[str, Tensor | StoredTensor]) -> Shard:
    """Write a safetensors file; the same tensors give the same bytes, those the safetensors library writes.

    A `Tensor` is written from memory; one of a checkpoint is copied from file to file, byte for byte, or made
    when its turn comes, where it is stored in another form; under the names that the mapping gives them.

    Raises:
        ResourceError: `disk_full`, `output_not_writable`; nothing is left of the file.
        SourceError: `source_changed`, when a copied file is not the planned one.
    """
    specs = {name: _spec(value) for name, value in tensors.items()}
    header, order = build_header(specs)
    with _replacing(path) as sink:
        sink.write(header)
        for name in order:
            value = tensors[name]
            if isinstance(value, TensorInfo):
                _copy_tensor(value, sink)
            else:
                sink.write(_data(value if isinstance(value, Tensor) else make(value)))
    return Shard(path.name, sink.digest(), sink.size, order, sink.size - len(header))


def read_shard(path: Path) -> Shard:
    """What a shard on disk holds, its digest computed from its bytes; header checked as any stranger's.

    Raises:
        SourceError: `invalid_safetensors`.
    """
    tensors = read_header(path)
    digest = hashlib.sha256()
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        for chunk in _chunks(descriptor):
            digest.update(chunk)
    tensor_bytes = sum(info.nbytes for info in tensors.values())
    return Shard(path.name, digest.hexdigest(), size, tuple(tensors), tensor_bytes)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write model.safetensors.index.json: which tensor is in which shard, and their bytes in all."""
    index = {
        "metadata": {"total_size": sum(shard.tensor_bytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_file(folder / INDEX_FILE, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a small file with the same discipline.

    Raises:
        ResourceError: `disk_full`, `output_not_writable`; what was there before stays.
    """
    with _replacing(path) as sink:
        sink.write(content)


def copy_file(checkpoint: Checkpoint, name: str, target: Path) -> None:
    """Copy one of the checkpoint's `other_files` byte for byte; the target's folder is made.

    Raises:
        ResourceError: `disk_full`, `output_not_writable`.
        SourceError: `source_unreadable`; `unsafe_link`, should the file have become a link out of the folder.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(resolve_inside(checkpoint.folder, name)) as descriptor, _replacing(target) as sink:
        for chunk in _chunks(descriptor):
            sink.write(chunk)


class _Sink:
    """A file being written, and the digest of what was."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._sha256.update(chunk)
            self.size += len(chunk)
            while chunk:
                chunk = chunk[os.write(self._descriptor, chunk) :]

    def digest(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[_Sink]:
    temporary = path.with_name(_temporary_name(path.name))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with writing(path):
            descriptor = os.open(temporary, flags, 0o666)
            try:
                yield _Sink(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _temporary_name(name: str) -> str:
    """Another name, as long as names may be: the source has files whose own are that long."""
    temporary = f".{name}{TEMPORARY_SUFFIX}"
    if len(os.fsencode(temporary)) <= _LONGEST_NAME:
        return temporary
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}{TEMPORARY_SUFFIX}"


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _spec(value: Tensor | StoredTensor) -> TensorSpec:
    if isinstance(value, Tensor):
        return TensorSpec(_SAFETENSORS_DTYPES[value.dtype], tuple(value.shape))
    return value.spec


def _data(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row-major order; only a strided or device tensor is copied."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy_tensor(info: TensorInfo, sink: _Sink) -> None:
    buffer = memoryview(bytearray(min(CHUNK_BYTES, info.nbytes)))
    with open_unchanged(info) as descriptor:
        for begin in range(info.begin, info.end, CHUNK_BYTES):
            part = buffer[: min(CHUNK_BYTES, info.end - begin)]
            read_into(descriptor, part, begin, info)
            sink.write(part)


def _chunks(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while True:
        with foreign("source_unreadable", "A file cannot be read"):
            chunk = os.pread(descriptor, CHUNK_BYTES, offset)
        if not chunk:
            return
        offset += len(chunk)
        yield chunk
