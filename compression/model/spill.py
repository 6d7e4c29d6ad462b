"""Hidden states on disk: what parked batches hold where memory is too small for it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from compression.boundary import writing


class Spill:
    """A scratch file without a name, of numbered slots: the system removes it with the process, however that
    ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "activations"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._slots: dict[int, tuple[int, int]] = {}  # offset and size, in bytes
        self._size = 0
        self._numbers = 0

    def new_slot(self) -> int:
        """A number under which one tensor at a time can be put away."""
        self._numbers += 1
        return self._numbers

    def put_away(self, tensor: Tensor, slot: int, *, changed: bool = True) -> None:
        """Write a tensor and give its memory back; the object stays, without storage.

        changed: False where the slot holds it already. A tensor that shares its storage stays in memory.

        Raises:
            ResourceError: `disk_full`, `output_not_writable`.
        """
        if not _owns_storage(tensor):
            return
        offset, size = self._slots.get(slot, (0, 0))
        if size < tensor.nbytes:
            offset, self._size = self._size, self._size + tensor.nbytes
            self._slots[slot] = offset, tensor.nbytes
        if changed:
            on_host = tensor.cpu()
            data = _bytes(on_host)
            with writing(self._path):
                while data:
                    written = os.pwrite(self._file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
        release(tensor)

    def bring_back(self, tensor: Tensor, slot: int) -> None:
        """Fill a tensor that was put away, in place: whoever refers to it sees what it held."""
        if tensor.untyped_storage().nbytes():
            return
        tensor.untyped_storage().resize_(tensor.nbytes)
        on_host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        data, (offset, _) = _bytes(on_host), self._slots[slot]
        while data:
            read = os.preadv(self._file.fileno(), [data], offset)
            if read == 0:
                raise EOFError(f"{self._path.name} is shorter than what was written to it")
            data, offset = data[read:], offset + read
        if on_host is not tensor:
            tensor.copy_(on_host)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


def release(tensor: Tensor) -> None:
    """Give a tensor's memory back while others still refer to the object; nobody may read it again."""
    if _owns_storage(tensor):
        tensor.untyped_storage().resize_(0)


def _owns_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, for as long as it lives. (NumPy would make its storage impossible to resize.)"""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
