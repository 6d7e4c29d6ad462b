"""Where the model's forward is suspended: hooks on its layers, linears, norms and experts.

Each hook asks which run it is called in (suspended.py), and does nothing in any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import greenlet
from torch import Tensor, nn

from compression.errors import PlanError, Problem
from compression.math.grid import fake_quantize
from compression.model.experts import Experts, Routed
from compression.model.streamed import StreamedModel
from compression.model.suspended import LayerCall, Role, SharedInput, SuspendedBatch, SuspendedRun
from compression.schemes import QuantizationArgs


class ForwardHooks:
    """The hooks on one model by which batches are suspended, and inputs of linears quantized.

    groups: each linear's group id. activations: how a linear's input is quantized when it is served, for the
    linears where it is. norms: the norm that makes a group's input, for groups where it will change. experts:
    the module of experts, for groups in one.

    fixed_inputs: what calibration fixed of how inputs are quantized, by linear, of the layer that runs.
    """

    def __init__(
        self,
        model: StreamedModel,
        groups: Mapping[str, str],
        activations: Mapping[str, QuantizationArgs],
        norms: Mapping[str, str] = MappingProxyType({}),
        experts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self._groups = groups
        self._activations = activations
        self._experts = frozenset(experts.values())
        self.fixed_inputs: Mapping[str, Tensor] = {}
        parks = {name: experts.get(group, group) for name, group in groups.items()}
        self._order = {group: position for position, group in enumerate(dict.fromkeys(parks.values()))}
        self._by_layer: dict[int, dict[str, None]] = {}
        for name, group in parks.items():
            self._by_layer.setdefault(model.layer_of(name), {})[group] = None
        self._readers = Counter(groups.values())
        stops = [*model.layers, model.head]
        self._hooks = [
            stop.register_forward_pre_hook(self._at_layer(i), with_kwargs=True)
            for i, stop in enumerate(stops)
        ]
        for name in groups:
            linear = model.module.get_submodule(name)
            self._hooks.append(linear.register_forward_pre_hook(self._at_linear(name)))
        for group, name in norms.items():
            norm = model.module.get_submodule(name)
            self._hooks.append(norm.register_forward_pre_hook(self._at_norm(group)))
        for name in self._experts:
            module = model.module.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(self._at_experts(name)))

    def groups_of(self, layer: int) -> list[str]:
        """The groups of a layer, its experts as one, in its order of execution."""
        return list(self._by_layer.get(layer, ()))

    def is_experts(self, group: str) -> bool:
        """Whether this is a module of experts, whose groups are shown as one."""
        return group in self._experts

    def order(self, group: str) -> int:
        """Position of a group in the model's order of execution."""
        return self._order[group]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _at_layer(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def park(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, SuspendedBatch):
                batch.layer, batch.entry = index, LayerCall(module, args, kwargs)
                batch.park()
                batch.entry = None

        return park

    def _at_norm(self, group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, SuspendedBatch) and batch.role.parks_at_groups:
                batch.norm_inputs[group] = inputs[0]

        return keep

    def _at_experts(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Any, ...] | None]:
        def show(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
            batch = greenlet.getcurrent()
            if not isinstance(batch, SuspendedRun):
                return None
            assert isinstance(module, Experts)
            routed = Routed(inputs[0], inputs[1], len(module))
            batch.show(name, routed)
            return (inputs[0], routed, *inputs[2:])

        return show

    def _at_linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        group = self._groups[name]
        args = self._activations.get(name)
        parks = group in self._order

        def visit(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            batch = greenlet.getcurrent()
            if not isinstance(batch, SuspendedRun):
                return None
            shared = batch.shared.get(group)
            if shared is None:
                shared = batch.shared[group] = SharedInput(
                    inputs[0], batch.norm_inputs.pop(group, None), None, self._readers[group]
                )
                if parks:
                    batch.show(group, inputs[0])
            if shared.tensor is not inputs[0]:
                raise _not_shared(name, group)
            shared.readers_left -= 1
            if shared.readers_left == 0:
                del batch.shared[group]
            if args is None or not batch.role.quantizes_activations:
                return None
            if shared.quantized is None:
                shared.quantized = fake_quantize(inputs[0], args, self.fixed_inputs.get(name))
            return (shared.quantized,)

        return visit


def running_role() -> Role | None:
    """The role of the batch that runs here; None in a rehearsal, and where no batch runs."""
    batch = greenlet.getcurrent()
    return batch.role if isinstance(batch, SuspendedBatch) else None


def _not_shared(name: str, group: str) -> PlanError:
    return PlanError(
        Problem(
            "plan_mismatch",
            f"{name} was planned to read the same tensor as {group}, and reads another one.",
            "The plan's table of shared inputs does not fit this model; please report its config.json.",
        )
    )
