"""A pretended CUDA device on the CPU: it refuses what CUDA refuses, and counts what costs a GPU time.

Torch believes its tensors on cuda:N. Each holds a tensor of the CPU, on which every operation really runs, by
the CPU's own kernels: a run gives the CPU's bytes wherever the engine asks the same arithmetic of both.

    with FakeGpu() as gpu:
        compress(..., device="cuda:0")
    gpu.counts()                # launches, syncs, copies
    gpu.syncs.most_common()     # by operation and line

It works below Python's functions, on ATen's operations as torch dispatches them. So what a call launches is
counted kernel by kernel, and so is where the C++ code of a library waits for the device.

launch   an operation that starts a kernel: everything but views, bookkeeping and what is counted below
sync     the host waits for the device: `.item()`, `bool()`, `.cpu()`, a mask as an index, `synchronize`
copy     host memory is copied to the device

It does not know which kernels CUDA lacks, but for those named below, nor how long anything takes.
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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.support import device_tensor
from tests.support.device_tensor import DeviceTensor, held, tensors_in

_aten: Any = torch.ops.aten

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
_WITH_INDICES = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
"""Operations that take indices from the host, at the price of a copy."""
_COPIES = frozenset({"copy_", "_to_copy"})

_OUTSIDE = (str(Path(torch.__file__).parent), __file__, device_tensor.__file__, "<")
"""Whose lines nobody asks for: torch's, ours, and those without a file."""


class Event(NamedTuple):
    """What was counted, and the innermost line outside of torch that asked for it."""

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


class FakeGpu(TorchDispatchMode):
    """The device, for as long as the block lasts. One at a time, in one thread.

    count: cards, cuda:0 on. launches, syncs, copies: what happened, by operation and line. used: the cards
    that tensors were made on. allocated, peak: bytes of tensors, on all cards.
    """

    def __init__(self, count: int = 1, *, name: str = "Pretended GPU", multiprocessors: int = 132) -> None:
        super().__init__()
        self.launches: Counter[Event] = Counter()
        self.syncs: Counter[Event] = Counter()
        self.copies: Counter[Event] = Counter()
        self.used: set[torch.device] = set()
        self.current: Any = "cuda:0"
        self.allocated = 0
        self.peak = 0
        self.card = SimpleNamespace(
            name=name, major=9, minor=0, multi_processor_count=multiprocessors, total_memory=80 << 30
        )
        self._count = count
        self._storages: dict[int, list[int]] = {}  # by address of the storage: its bytes, its tensors
        self._watched: dict[int, torch.UntypedStorage] = {}  # those that may have been resized
        self._undo = ExitStack()

    def __enter__(self) -> FakeGpu:
        device_tensor.use(self)
        self._undo.callback(device_tensor.use, None)
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

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        here = [tensor.device for tensor in tensors if isinstance(tensor, DeviceTensor)]
        wanted = _device_of(args, kwargs)
        if not here and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        kind = _kind(func)
        _require_possible(kind, tensors, args)
        target = wanted or (args[0].device if kind.name == "copy_" else here[0])
        counter = self._counter(kind, target, args)
        if counter is not None:
            counter[Event(kind.name, _line())] += 1
        result = _compute(kind, list(map(held, args)), {key: held(value) for key, value in kwargs.items()})
        if kind.mutates:
            return _mutated(kind, args, kwargs)
        if target.type != "cuda":
            return result
        if isinstance(result, list | tuple):
            return type(result)(self._made(each, target) for each in result)
        return self._made(result, target)

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Scaled dot product attention of queries, keys and values that lie on one device."""
        tensors = list(tensors_in((*args, *kwargs.values())))
        _require_one_device("scaled_dot_product_attention", tensors)
        self._launch("scaled_dot_product_attention")
        on_host = {key: held(value) for key, value in kwargs.items()}
        with _disable_current_modes():
            found = torch.nn.functional.scaled_dot_product_attention(*map(held, args), **on_host)
        made: Tensor = self._made(found, tensors[0].device)
        return made

    def read_at(self, tensor: DeviceTensor, index: Any) -> Tensor:
        """tensor[index]: a view, or a copy of what tensors and lists among the indices choose."""
        found = tensor.held[self._on_host(index)]
        if found.untyped_storage()._cdata != tensor.held.untyped_storage()._cdata:
            if any(map(_is_mask, _indices(index))):
                self.count_sync("index by a mask")
            self._launch("index")
        made: Tensor = self._made(found, tensor.device)
        return made

    def write_at(self, tensor: DeviceTensor, index: Any, value: Any) -> None:
        """tensor[index] = value. Where that is a number, a mask costs no sync."""
        if isinstance(value, Tensor):
            _require_one_device("index_put_", [tensor, value])
            if any(map(_is_mask, _indices(index))):
                self.count_sync("index by a mask")
        tensor.held[self._on_host(index)] = held(value)
        self._launch("index_put_")

    def count_sync(self, operation: str) -> None:
        """The host waits for the device."""
        self.syncs[Event(operation, _line())] += 1

    def watch(self, storage: torch.UntypedStorage) -> None:
        """Someone has the storage in hand, and may resize it."""
        self._watched[storage._cdata] = storage

    def _on_host(self, index: Any) -> Any:
        """An index as the CPU gets it. A number on the device is waited for, a list is sent there."""
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

    def _counter(self, kind: _Kind, target: torch.device, args: tuple[Any, ...]) -> Counter[Event] | None:
        """Where an operation is counted, None where it costs nothing."""
        if kind.name in _COPIES:
            source = args[1] if kind.name == "copy_" else args[0]
            if target.type == "cuda":
                return self.launches if isinstance(source, DeviceTensor) else self.copies
            return self.syncs if target.type == "cpu" else None
        if kind.name in _READ_BY_HOST:
            return self.syncs
        if kind.name in _WITH_INDICES:
            indices = list(tensors_in(args[1]))
            if any(map(_is_mask, indices)):
                return self.syncs
            return self.launches if all(isinstance(i, DeviceTensor) for i in indices) else self.copies
        free = kind.views or kind.name in _WITHOUT_KERNEL or target.type == "meta"
        return None if free else self.launches

    def _made(self, value: Any, device: torch.device) -> Any:
        """A result of the CPU as a tensor of the device, its memory counted while a tensor uses it."""
        if not isinstance(value, Tensor):
            return value
        made = DeviceTensor(value, device)
        self.used.add(device)
        storage = value.untyped_storage()
        size_and_users = self._storages.setdefault(storage._cdata, [0, 0])
        if size_and_users[1] == 0:
            size_and_users[0] = storage.nbytes()
            self.allocated += storage.nbytes()
            self._settle()
        size_and_users[1] += 1
        weakref.finalize(made, self._dropped, storage._cdata)
        return made

    def _dropped(self, key: int) -> None:
        size_and_users = self._storages[key]
        size_and_users[1] -= 1
        if size_and_users[1] == 0:
            self._settle()
            self.allocated -= size_and_users[0]
            del self._storages[key]
            self._watched.pop(key, None)

    def _settle(self) -> None:
        """Bring the bytes of storages that were resized up to date, and the peak."""
        for key, storage in self._watched.items():
            known = self._storages.get(key)
            if known is not None and known[0] != storage.nbytes():
                self.allocated += storage.nbytes() - known[0]
                known[0] = storage.nbytes()
        self.peak = max(self.peak, self.allocated)

    def _runtime(self) -> dict[str, Callable[..., Any]]:
        """What stands in for functions of torch.cuda."""

        def reset(*_: Any) -> None:
            self._settle()
            self.peak = self.allocated

        def peak(*_: Any) -> int:
            self._settle()
            return self.peak

        def set_device(device: Any) -> None:
            self.current = device

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self._count,
            "current_device": lambda: torch.device(self.current).index,
            "set_device": set_device,
            "get_device_properties": lambda *_: self.card,
            "get_device_capability": lambda *_: (self.card.major, self.card.minor),
            "get_device_name": lambda *_: self.card.name,
            "is_bf16_supported": lambda *_, **__: True,
            "synchronize": lambda *_: self.count_sync("synchronize"),
            "reset_peak_memory_stats": reset,
            "max_memory_allocated": peak,
            "max_memory_reserved": peak,
            "memory_allocated": lambda *_: self.allocated,
            "empty_cache": lambda: None,
        }


@contextmanager
def _tensors_are_made_on_the_host() -> Iterator[None]:
    """torch.tensor(..., device="cuda:0") makes its tensor on the CPU, and copies it where we see it."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@dataclass(frozen=True)
class _Kind:
    """What its schema says of an operation. mutates: the arguments that it changes, by name and place."""

    func: OpOverload
    name: str
    views: bool
    mutates: tuple[tuple[str, int], ...]
    returns: int


@cache
def _kind(func: OpOverload) -> _Kind:
    schema: Any = func._schema
    mutates = tuple(
        (argument.name, place)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    aliases = [each.alias_info for each in schema.returns if each.alias_info is not None]
    views = any(not alias.is_write for alias in aliases)
    return _Kind(func, schema.name.removeprefix("aten::"), views, mutates, len(schema.returns))


def _compute(kind: _Kind, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run it on the CPU; what only CUDA has is made of what the CPU has."""
    if kind.func is _aten.mm.dtype:
        return _aten.mm(args[0].to(args[2]), args[1].to(args[2]))
    if kind.func in (_aten._log_softmax.default, _aten._softmax.default) and args[2]:
        return kind.func(args[0].float(), args[1], False)
    return kind.func(*args, **kwargs)


def _mutated(kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that an operation in place returns."""
    changed = [kwargs[name] if name in kwargs else args[place] for name, place in kind.mutates]
    for tensor in changed:
        if isinstance(tensor, DeviceTensor):
            assert tensor.shape == tensor.held.shape, f"{kind.name} changed a shape in place"
    if kind.returns == 0:
        return None
    return changed[0] if kind.returns == 1 else tuple(changed)


def _require_possible(kind: _Kind, tensors: list[Tensor], args: tuple[Any, ...]) -> None:
    """Refuse what CUDA refuses.

    Raises:
        RuntimeError: tensors of several devices, integers where there is no kernel for them, or an operation
            without a deterministic kernel where one is asked for.
    """
    if kind.name not in _COPIES:
        follows = kind.name in _WITH_INDICES and isinstance(args[0], DeviceTensor)
        _require_one_device(kind.name, [args[0], *tensors_in(args[2:])] if follows else tensors)
    floating = all(tensor.is_floating_point() for tensor in tensors)
    if kind.name in _WITHOUT_INTEGERS and not floating:
        raise RuntimeError(f'"{kind.name}_cuda" not implemented for integers, at {_line()}')
    refused = not _REFUSED.isdisjoint((kind.name, str(kind.func).removeprefix("aten.")))
    refused |= kind.name.startswith("cumsum") and floating
    if refused and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{kind.name} has no deterministic implementation on CUDA, at {_line()}")


def _require_one_device(name: str, tensors: list[Tensor]) -> None:
    """Numbers on the CPU go with any device, but for the one that is changed; nothing else does."""
    devices = {tensor.device for tensor in tensors if tensor.dim() > 0 or tensor.device.type != "cpu"}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} at {_line()} found {found}!"
        )


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where the caller wants the result, if it says so."""
    device: torch.device | None = kwargs.get("device")
    return device or next((value for value in args if isinstance(value, torch.device)), None)


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    """How many numbers a mask chooses, the host has to be told."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _line() -> str:
    """The innermost line outside of torch and of the pretended device, as folder/file:number."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
