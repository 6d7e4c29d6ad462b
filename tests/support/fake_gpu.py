"""A pretended CUDA device on the CPU: it refuses what CUDA refuses, and counts what costs a GPU time.

Tensors on it are `DeviceTensor`s: torch believes them on cuda:N, and each holds a plain CPU tensor, on which
every operation really runs, by the kernels that the CPU has. So a run on it gives the CPU's bytes wherever the
engine asks the same arithmetic of both.

    with FakeGpu() as gpu:
        compress(..., device="cuda:0")
    gpu.counts()                # launches, syncs, copies
    gpu.syncs.most_common()     # by operation and line

It works below Python's functions, on ATen's operations, as torch dispatches them: what one call really launches
is counted, and where a library's own C++ code waits for the device, too.

launch   an operation that starts a kernel: everything but views, bookkeeping and what is counted below
sync     the host waits for the device: `.item()`, `bool()`, `.cpu()`, a mask as an index, nonzero, synchronize
copy     host memory is copied to the device

It does not know which kernels CUDA lacks, but for those in `_REFUSED`, nor how long anything takes.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
CPU = torch.device("cpu")

_WITHOUT_KERNEL = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
)
"""Operations that touch no number, besides views."""
_READ_BY_HOST = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
    }
)
"""Operations whose result, or whose shape, the host has to wait for."""
_WITHOUT_INTEGERS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "addmv", "addmv_", "mv", "dot"})
"""Products that CUDA has for floating point only."""
_REFUSED = frozenset({"kthvalue", "put_", "histc", "median.dim"})
"""What raises on CUDA under `use_deterministic_algorithms`; so does a cumsum of floating point."""
_FOLLOW_INDICES = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Operations that take indices from the host, at the price of a copy."""

_HERE = __file__
_TORCH = str(Path(torch.__file__).parent)


class Event(NamedTuple):
    """What was counted, and the line that asked for it: the innermost one outside of torch."""

    operation: str
    line: str


@dataclass(frozen=True)
class Counts:
    """How often each happened."""

    launches: int = 0
    syncs: int = 0
    copies: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.launches - other.launches, self.syncs - other.syncs, self.copies - other.copies)


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device. `held`: its numbers, which only `FakeGpu` may touch."""

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
        """Attention is one kernel, as on the CPU: torch would take another way for a device it has no code of."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _running().attention(args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on the pretended device after it was taken away.")

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage that is really there: it can be resized, and has an address."""
        _running().watch(self.held.untyped_storage())
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        raise RuntimeError("The host looks into the device's memory.")

    def tolist(self) -> Any:
        _running().count_sync("tolist")
        return self.held.tolist()

    def item(self) -> Any:
        _running().count_sync("item")
        return self.held.item()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        _running().count_sync("item")
        return self.held.__index__()

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return aten.copy_(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        if self.is_contiguous(memory_format=memory_format):
            return self
        return aten.clone(self, memory_format=memory_format)

    def nonzero(self, **_: Any) -> Any:
        return aten.nonzero(self)

    def __invert__(self) -> Any:
        return aten.bitwise_not(self)

    def __getitem__(self, index: Any) -> Any:
        return _running().read_at(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        _running().write_at(self, index, value)

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r}, device={self.device})"


class FakeGpu(TorchDispatchMode):
    """The device, for as long as the block lasts. One at a time, and one thread.

    count: devices, cuda:0 on. launches, syncs, copies: what happened, by operation and line.
    """

    def __init__(self, count: int = 1, *, name: str = "Pretended GPU", multiprocessors: int = 132) -> None:
        super().__init__()
        self.launches: Counter[Event] = Counter()
        self.syncs: Counter[Event] = Counter()
        self.copies: Counter[Event] = Counter()
        self.allocated = 0
        self.peak = 0
        self._count = count
        self._properties = SimpleNamespace(
            name=name, major=9, minor=0, multi_processor_count=multiprocessors, total_memory=80 << 30
        )
        self._storages: dict[int, list[int]] = {}  # by address of the StorageImpl: bytes, tensors
        self._watched: dict[int, torch.UntypedStorage] = {}  # those that may have been resized
        self._undo = ExitStack()

    def __enter__(self) -> FakeGpu:
        global _device
        assert _device is None, "one pretended device at a time"
        _device = self
        self._undo.callback(_forget)
        for function, replacement in self._runtime().items():
            self._undo.enter_context(patch.object(torch.cuda, function, replacement))
        self._undo.enter_context(_tensors_are_made_on_the_host())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._undo.close()

    def counts(self) -> Counts:
        """What happened so far."""
        return Counts(self.launches.total(), self.syncs.total(), self.copies.total())

    def count_sync(self, operation: str) -> None:
        """The host waits for the device."""
        self.syncs[Event(operation, _line())] += 1

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        here = {tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor)}
        wanted = _device_of(args, kwargs)
        if not here and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        kind = _kind(func)
        target = self._placed(kind, wanted, here, tensors, args)
        self._count_operation(kind, target, args, kwargs)
        result = _compute(kind, list(map(_held, args)), {key: _held(value) for key, value in kwargs.items()})
        if kind.mutates:
            return self._mutated(kind, args, kwargs)
        if target.type != "cuda":
            return result
        if isinstance(result, list | tuple):
            return type(result)(self._made(each, target) for each in result)
        return self._made(result, target)

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeviceTensor:
        """Scaled dot product attention of queries, keys and values that lie on one device."""
        tensors = list(_tensors((*args, *kwargs.values())))
        _require_one_device("scaled_dot_product_attention", tensors)
        self._launch("scaled_dot_product_attention")
        with torch.utils._python_dispatch._disable_current_modes():
            made = torch.nn.functional.scaled_dot_product_attention(
                *map(_held, args), **{key: _held(value) for key, value in kwargs.items()}
            )
        result: DeviceTensor = self._made(made, tensors[0].device)
        return result

    def read_at(self, tensor: DeviceTensor, index: Any) -> Any:
        """tensor[index]: a view, or a copy of what tensors and lists among the indices choose."""
        found = tensor.held[self._on_host(index)]
        if found.untyped_storage()._cdata != tensor.held.untyped_storage()._cdata:
            if any(map(_is_mask, _indices(index))):
                self.count_sync("index by a mask")
            self._launch("index")
        return self._made(found, tensor.device)

    def write_at(self, tensor: DeviceTensor, index: Any, value: Any) -> None:
        """tensor[index] = value."""
        if isinstance(value, Tensor):
            _require_one_device("index_put_", [tensor, value])
            if any(map(_is_mask, _indices(index))):
                self.count_sync("index by a mask")
        tensor.held[self._on_host(index)] = _held(value)
        self._launch("index_put_")

    def _on_host(self, index: Any) -> Any:
        """An index as the CPU gets it; a number that lies on the device is waited for, a list is sent there."""
        if isinstance(index, tuple):
            return tuple(map(self._on_host, index))
        if isinstance(index, slice):
            return slice(*map(self._on_host, (index.start, index.stop, index.step)))
        if isinstance(index, DeviceTensor):
            return int(index) if index.dim() == 0 and not _is_mask(index) else index.held
        if isinstance(index, list) or (isinstance(index, Tensor) and index.dim() > 0):
            self.copies[Event("index", _line())] += 1
        return index

    def _launch(self, operation: str) -> None:
        self.launches[Event(operation, _line())] += 1

    def watch(self, storage: torch.UntypedStorage) -> None:
        """Someone has the storage in hand, and may resize it."""
        self._watched[storage._cdata] = storage

    def _placed(
        self,
        kind: _Kind,
        wanted: torch.device | None,
        here: set[torch.device],
        tensors: list[Tensor],
        args: tuple[Any, ...],
    ) -> torch.device:
        """Where the result lies.

        Raises:
            RuntimeError: CUDA would refuse the operation.
        """
        if kind.name not in ("copy_", "_to_copy"):
            indexed = kind.name in _FOLLOW_INDICES and isinstance(args[0], DeviceTensor)
            _require_one_device(kind.name, [args[0], *_tensors(args[2:])] if indexed else tensors)
        floating = all(tensor.is_floating_point() for tensor in tensors)
        refused = kind.name in _REFUSED or str(kind.func).removeprefix("aten.") in _REFUSED
        if torch.are_deterministic_algorithms_enabled() and (
            refused or (kind.name.startswith("cumsum") and floating)
        ):
            raise RuntimeError(f"{kind.name} has no deterministic implementation on CUDA.")
        if kind.name in _WITHOUT_INTEGERS and not floating:
            raise RuntimeError(f'"{kind.name}_cuda" not implemented for integers')
        if wanted is not None:
            return wanted
        return args[0].device if kind.name == "copy_" else next(iter(here))

    def _count_operation(
        self, kind: _Kind, target: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        event = Event(kind.name, "")
        if kind.name in ("copy_", "_to_copy"):
            source = args[1] if kind.name == "copy_" else args[0]
            into, out_of = target.type == "cuda", isinstance(source, DeviceTensor)
            counter = self.launches if into and out_of else self.copies if into else self.syncs
        elif kind.name in _READ_BY_HOST:
            counter = self.syncs
        elif kind.name in _FOLLOW_INDICES and any(map(_is_mask, _tensors(args[1]))):
            counter = self.syncs
        elif kind.name in _FOLLOW_INDICES and not all(
            isinstance(index, DeviceTensor) for index in _tensors(args[1])
        ):
            counter = self.copies
        elif kind.views or kind.name in _WITHOUT_KERNEL or target.type == "meta":
            return
        else:
            counter = self.launches
        counter[event._replace(line=_line())] += 1

    def _mutated(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments that an operation in place returns."""
        changed = [kwargs.get(name, args[at] if at < len(args) else None) for name, at in kind.mutates]
        for tensor in changed:
            if isinstance(tensor, DeviceTensor):
                assert tensor.shape == tensor.held.shape, f"{kind.name} changed a shape in place"
        if kind.returns == 0:
            return None
        return changed[0] if kind.returns == 1 else tuple(changed)

    def _made(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = DeviceTensor(value, device)
        storage = value.untyped_storage()
        key = storage._cdata
        held = self._storages.setdefault(key, [0, 0])
        if held[1] == 0:
            held[0] = storage.nbytes()
            self.allocated += held[0]
            self._settle()
            self.peak = max(self.peak, self.allocated)
        held[1] += 1
        weakref.finalize(made, self._dropped, key)
        return made

    def _settle(self) -> None:
        """Bring the bytes of resized storages up to date."""
        for key, storage in self._watched.items():
            held = self._storages.get(key)
            if held is not None and held[0] != storage.nbytes():
                self.allocated += storage.nbytes() - held[0]
                held[0] = storage.nbytes()

    def _dropped(self, key: int) -> None:
        held = self._storages[key]
        held[1] -= 1
        if held[1] == 0:
            self._settle()
            self.allocated -= held[0]
            del self._storages[key]
            self._watched.pop(key, None)

    def _runtime(self) -> dict[str, Callable[..., Any]]:
        """What stands in for functions of torch.cuda."""

        def reset(*_: Any) -> None:
            self._settle()
            self.peak = self.allocated

        def peak(*_: Any) -> int:
            self._settle()
            self.peak = max(self.peak, self.allocated)
            return self.peak

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self._count,
            "current_device": lambda: 0,
            "get_device_properties": lambda *_: self._properties,
            "get_device_capability": lambda *_: (self._properties.major, self._properties.minor),
            "get_device_name": lambda *_: self._properties.name,
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": lambda *_: self.count_sync("synchronize"),
            "reset_peak_memory_stats": reset,
            "max_memory_allocated": peak,
            "max_memory_reserved": peak,
            "memory_allocated": lambda *_: self.allocated,
            "empty_cache": lambda: None,
        }


_device: FakeGpu | None = None


def _running() -> FakeGpu:
    assert _device is not None, "the pretended device was taken away"
    return _device


def _forget() -> None:
    global _device
    _device = None


@contextmanager
def _tensors_are_made_on_the_host() -> Iterator[None]:
    """torch.tensor(..., device="cuda:0") makes its tensor on the CPU, and copies it by an operation we see."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@dataclass(frozen=True)
class _Kind:
    """What its schema says of an operation. mutates: arguments it returns changed, by name and place."""

    func: OpOverload
    name: str
    views: bool
    mutates: tuple[tuple[str, int], ...]
    returns: int


@cache
def _kind(func: OpOverload) -> _Kind:
    schema: Any = func._schema
    written = tuple(
        (argument.name, place)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    aliases = [each.alias_info for each in schema.returns if each.alias_info is not None]
    views = any(not alias.is_write for alias in aliases)
    return _Kind(func, schema.name.removeprefix("aten::"), views, written, len(schema.returns))


def _compute(kind: _Kind, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run it on the CPU; what only CUDA has is made of what the CPU has."""
    if kind.func is aten.mm.dtype:
        return aten.mm(args[0].to(args[2]), args[1].to(args[2]))
    if kind.func in (aten._log_softmax.default, aten._softmax.default) and args[2]:
        return kind.func(args[0].float(), args[1], False)
    if kwargs.get("pin_memory") is not None:
        kwargs["pin_memory"] = False
    return kind.func(*args, **kwargs)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _held(value: Any) -> Any:
    """The value as the CPU gets it."""
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return type(value)(_held(each) for each in value)
    return value


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where the caller wants the result, if it says so."""
    device: torch.device | None = kwargs.get("device")
    return device if device is not None else next((a for a in args if isinstance(a, torch.device)), None)


def _require_one_device(name: str, tensors: list[Tensor]) -> None:
    """Scalars of the CPU go with any device; nothing else does."""
    devices = {tensor.device for tensor in tensors if tensor.dim() > 0 or tensor.device.type != "cpu"}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} at {_line()} found {found}!"
        )


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    """How many numbers a mask chooses, the host has to be told."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _line() -> str:
    """The innermost line outside of torch and of this file, as folder/file:number."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != _HERE and not name.startswith((_TORCH, "<")):
            break
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
