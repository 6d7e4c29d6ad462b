"""Hidden states on disk: what parked batches hold where memory is too small for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from compression.checkpoint.writer import naming_full_disk


class Spill:
    """A scratch file without a name, of numbered slots: the system removes it with the process, however that
    ends. A slot has the size of the first tensor that is put into it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "activations"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._offsets: dict[int, int] = {}
        self._size = 0

    def put_away(self, tensor: Tensor, slot: int, *, changed: bool = True) -> None:
        """Write a tensor and give its memory back; the object stays, without storage.

        changed: False where the slot holds it already. A tensor that shares its storage stays in memory.

        Raises:
            ResourceError: `disk_full`.
        """
        if not _owns_storage(tensor):
            return
        if slot not in self._offsets:
            self._offsets[slot], self._size = self._size, self._size + tensor.nbytes
        if changed:
            data, offset = memoryview(_bytes(tensor.cpu()).numpy()), self._offsets[slot]
            with naming_full_disk(self._path):
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
        data, offset = memoryview(_bytes(on_host).numpy()), self._offsets[slot]
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


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
