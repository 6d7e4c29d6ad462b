"""Tensors of the pretended CUDA device (fake_gpu.py): what torch takes for a tensor on cuda:N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

_aten: Any = torch.ops.aten
_CPU = torch.device("cpu")


class Device(Protocol):
    """What the tensors ask of their device."""

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor: ...
    def count_sync(self, operation: str) -> None: ...
    def read_at(self, tensor: DeviceTensor, index: Any) -> Tensor: ...
    def write_at(self, tensor: DeviceTensor, index: Any, value: Any) -> None: ...
    def watch(self, storage: torch.UntypedStorage) -> None: ...


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device. `held`: its numbers, which only the device may touch.

    Most operations reach the device by torch's own dispatch. Methods stand here where torch's C++ code would
    first make a CUDA device the current one, which a build without CUDA cannot, or would look at the numbers.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Attention is one kernel, as on the CPU: for a device it has no code of, torch makes it of parts."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return running().attention(args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it as no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} was called on the pretended device after it was taken away.")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage that is really there: it can be resized, and has an address."""
        running().watch(self.held.untyped_storage())
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        raise RuntimeError("The host looks into the device's memory.")

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def item(self) -> Any:
        running().count_sync("item")
        return self.held.item()

    def tolist(self) -> Any:
        running().count_sync("tolist")
        return self.held.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        running().count_sync("item")
        return self.held.__index__()

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return _aten.copy_(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        if self.is_contiguous(memory_format=memory_format):
            return self
        return _aten.clone(self, memory_format=memory_format)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = _aten.nonzero(self)
        return found.unbind(1) if as_tuple else found

    def __invert__(self) -> Any:
        return _aten.bitwise_not(self)

    def __getitem__(self, index: Any) -> Any:
        return running().read_at(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        running().write_at(self, index, value)

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"DeviceTensor({self.held!r}, device={self.device})"


_running: Device | None = None


def use(device: Device | None) -> None:
    """Say which device the tensors are on; None takes it away. There is one at a time."""
    global _running
    assert device is None or _running is None, "one pretended device at a time"
    _running = device


def running() -> Device:
    """The device the tensors are on."""
    assert _running is not None, "the pretended device was taken away"
    return _running


def held(value: Any) -> Any:
    """An argument of an operation as the CPU gets it."""
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, torch.device) and value.type == "cuda":
        return _CPU
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return type(value)(map(held, value))
    return value


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors among arguments, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
