"""What modules keep besides parameters: rotary frequencies, mostly, which some kinds make anew by length.

Such a module is left as it was found. A batch then computes what it would compute alone in a model that has
just been loaded, whatever batches came before it and wherever a run was taken up again; and a run on tensors
without storage leaves none behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def stateful(module: nn.Module, outside: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Modules without parameters that hold buffers which no checkpoint has, by name.

    outside: what names begin with that are left out.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if part._non_persistent_buffers_set
        and not name.startswith(outside)
        and next(part.parameters(), None) is None
    }


class Found:
    """A module as it was found: its buffers and plain attributes, to be put back."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._buffers = _mapped(Tensor.clone, module._buffers)
        self._attributes = _mapped(Tensor.clone, _attributes(module))

    def put_back(self) -> None:
        """Make the module what it was; what it got since is gone."""
        own = vars(self._module)
        for name in _attributes(self._module).keys() - self._attributes.keys():
            del own[name]
        own.update(_mapped(Tensor.clone, self._attributes))
        self._module._buffers.clear()
        self._module._buffers.update(_mapped(Tensor.clone, self._buffers))


def forget_between_calls(modules: Iterable[nn.Module]) -> None:
    """From now on each call of these modules finds them as they are now."""
    for module in modules:
        found = Found(module)
        module.register_forward_pre_hook(lambda _module, _args, found=found: found.put_back())


@contextmanager
def without_storage(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let these modules, whose code may look at values, be called with tensors on the meta device.

    They compute with zeros on the CPU, and give back meta tensors of the same shapes and dtypes.
    """
    with ExitStack() as undo:
        for module in modules:
            undo.callback(Found(module).put_back)
            module._buffers.update(_mapped(_zeros, module._buffers))
            vars(module).update(_mapped(_zeros, _attributes(module)))
            before = module.register_forward_pre_hook(
                lambda _module, args, kwargs: tree_map_only(Tensor, _zeros, (args, kwargs)),
                with_kwargs=True,
            )
            after = module.register_forward_hook(
                lambda _module, _args, result: tree_map_only(Tensor, lambda t: t.to("meta"), result)
            )
            undo.callback(before.remove)
            undo.callback(after.remove)
        yield


def without_values(
    module: nn.Module, *, loaded_later: tuple[str, ...] = (), outside: tuple[str, ...] = ()
) -> list[str]:
    """Names of all that is still on the meta device: parameters, buffers, and tensors in plain attributes.

    loaded_later: what names begin with of which a checkpoint's tensors do not count. outside: what names
    begin with of which nothing counts.
    """
    missing = []
    for path, part in module.named_modules():
        held: dict[str, Any] = dict(_attributes(part))
        held |= {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        if f"{path}.".startswith(outside):
            continue
        if not f"{path}.".startswith(loaded_later):
            held |= {**part._buffers, **part._parameters}
        missing += [
            f"{path}.{name}".removeprefix(".")
            for name, value in held.items()
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_iter(value))
        ]
    return missing


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _mapped(change: Callable[[Tensor], Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, every tensor in them changed."""
    return {name: tree_map_only(Tensor, change, value) for name, value in values.items()}


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu")
