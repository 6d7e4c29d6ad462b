"""The model's own forward, suspended wherever the main loop wants to look.

Each batch runs the whole model in a greenlet of its own:

    main loop   ──run_through──▶  batch 0 … layer k ──▶ parks at the entry of layer k+1
                ◀───────────────
                ──groups───────▶  batch 0 … q_proj wants its input: parks, and hands the input over
                                  batch 1 … the same
                ◀───────────────  the main loop looks at the inputs, replaces q, k and v, and goes on:
                                  what the next linear sees has passed through the new weights

So one forward pass is enough for true sequential calibration, and no argument of a decoder layer is recorded,
guessed or replayed. A greenlet holds its Python frames, and with them the activations, while it is parked.

Where that is too much to hold, batches park between layers only, their hidden states on disk (spill.py), and
what a group reads is shown by rehearsals: a greenlet of its own runs the layer, with the arguments that the
batch waits with at its entry, up to the group, and is thrown away (docs/adr/0008-hidden-states-on-disk.md).

Before the experts of a layer batches park once, and hand over what all of them read and the routing: what
each expert sees is cut from that (expert_grams.py).

Rules that keep this correct: gradients are off in the whole thread, nothing parks inside a torch mode, and
only one thread switches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import greenlet
import torch
from torch import Tensor, nn

from compression.errors import PlanError, Problem
from compression.math.grid import fake_quantize
from compression.model.experts import Routed
from compression.model.passes import Batch, Entry, Pass, Rehearsal, SharedInput
from compression.model.spill import Spill, release
from compression.model.streamed import StreamedModel
from compression.schemes import QuantizationArgs


@dataclass(frozen=True)
class GroupInputs:
    """What every batch is about to feed to one group, [batch, seq, in] in the compute dtype.

    To be gone through as often as one likes.
    """

    group: str
    inputs: Iterable[Tensor]


@dataclass(frozen=True)
class ExpertsInputs:
    """What every batch is about to feed to the experts of a layer, to be gone through as often as wanted."""

    experts: str
    inputs: Iterable[Routed]


class Stream:
    """Batches that pass through the model side by side, in one role (calibration, original, compressed).

    With a `spill`, the hidden states of batches that are parked between layers lie in its file, and a layer's
    groups are shown by rehearsals; without, in memory, and batches stop at groups on their way.
    """

    def __init__(
        self,
        forwards: Forwards,
        batches: Sequence[Tensor],
        *,
        quantize_activations: bool,
        spill: Spill | None = None,
    ) -> None:
        self._forwards = forwards
        self._spill = spill
        module = forwards.model.module
        self._batches = [Batch(module, tokens, self, spill.new_slot() if spill else 0) for tokens in batches]
        self.parks_at_groups = False
        self.quantizes_activations = quantize_activations
        for batch in self._batches:
            batch.switch()  # runs the embedding, parks at the entry of layer 0
            self._put_away(batch)

    def groups(self, layer: int) -> Iterator[GroupInputs | ExpertsInputs]:
        """Stop before each group of a layer, in the order in which the layer runs them; before all groups of
        its experts at once.

        Weights that the caller replaces while it holds a group are the ones the group runs with. Afterwards
        `run_through` passes the layer, unless the batches have already.
        """
        if self._spill is not None:
            for group in self._forwards.groups_of(layer):
                yield self._forwards.inputs(group, self.rehearsed(layer, group))
            return
        self.parks_at_groups = True
        self._resume([batch for batch in self._batches if batch.layer == layer])
        while waiting := [batch for batch in self._batches if batch.group is not None]:
            group = min((batch.group for batch in waiting if batch.group), key=self._forwards.order)
            here = [batch for batch in waiting if batch.group == group]
            yield self._forwards.inputs(group, [batch.shown for batch in here if batch.shown is not None])
            self._resume(here)
        self.parks_at_groups = False

    def rehearsed(self, layer: int, group: str) -> Iterable[Tensor | Routed]:
        """What batches at the entry of a layer would hand to one of its groups; made anew at each going."""
        return _Rehearsed(self, layer, group)

    def rehearse(self, layer: int, group: str) -> Iterator[Tensor | Routed]:
        """Run every batch from the entry of a layer to one of its groups, one batch at a time."""
        for batch in self._batches:
            if batch.layer != layer:
                continue
            self._bring_back(batch)
            rehearsal = Rehearsal(batch, group)
            try:
                rehearsal.switch()
                if rehearsal.shown is not None:
                    yield rehearsal.shown
            finally:
                if not rehearsal.dead:
                    rehearsal.throw(greenlet.GreenletExit)
                self._put_away(batch, changed=False)

    def run_through(self, layer: int) -> None:
        """Pass through one layer with the weights it has, up to the entry of the next (or of lm_head)."""
        self._resume([batch for batch in self._batches if batch.layer == layer])

    def renew_inputs(self, group: str, norm: nn.Module) -> None:
        """After a norm has changed: what parked batches hand to its group becomes what it makes now."""
        for batch in self._batches:
            if batch.group == group:
                shared = batch.shared[group]
                shared.tensor.copy_(norm(shared.norm_input))

    def finish(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the head, one batch at a time: (logits [batch, seq, vocab], tokens [batch, seq]).

        What was yielded is held by nobody else.
        """
        while self._batches:
            yield self._finished(self._batches.pop(0))

    def close(self) -> None:
        """End every batch where it stands and free what it holds."""
        for batch in self._batches:
            batch.throw(greenlet.GreenletExit)
        self._batches.clear()

    def _finished(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self._bring_back(batch)
        batch.switch()
        assert batch.logits is not None
        return batch.logits, batch.tokens

    def _resume(self, batches: list[Batch]) -> None:
        for batch in batches:
            batch.group = None
            self._bring_back(batch)
            before = batch.entry
            batch.switch()
            assert not torch.is_grad_enabled()
            if self._spill and before and not _same_storage(before, batch.entry):
                release(before.hidden_state)
            self._put_away(batch)

    def _put_away(self, batch: Batch, *, changed: bool = True) -> None:
        if self._spill and batch.entry:
            self._spill.put_away(batch.entry.hidden_state, batch.slot, changed=changed)

    def _bring_back(self, batch: Batch) -> None:
        if self._spill and batch.entry:
            self._spill.bring_back(batch.entry.hidden_state, batch.slot)


def _same_storage(one: Entry, other: Entry | None) -> bool:
    left, right = (entry and entry.hidden_state.untyped_storage().data_ptr() for entry in (one, other))
    return left == right


class _Rehearsed(Iterable[Tensor | Routed]):
    """The inputs of a group, made anew each time they are gone through."""

    def __init__(self, stream: Stream, layer: int, group: str) -> None:
        self._stream, self._layer, self._group = stream, layer, group

    def __iter__(self) -> Iterator[Tensor | Routed]:
        return self._stream.rehearse(self._layer, self._group)


class Forwards:
    """Makes streams over one model, and owns the hooks by which they park.

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

    def stream(
        self, batches: Sequence[Tensor], *, quantize_activations: bool, spill: Spill | None = None
    ) -> Stream:
        """A new stream, every batch parked at the entry of layer 0. Tokens int64 [batch, seq]."""
        tokens = [batch.to(self.model.device) for batch in batches]
        return Stream(self, tokens, quantize_activations=quantize_activations, spill=spill)

    def inputs(self, group: str, shown: Iterable[Tensor | Routed]) -> GroupInputs | ExpertsInputs:
        """What batches show before a group, or before a module of experts."""
        if group in self._experts:
            return ExpertsInputs(group, cast(Iterable[Routed], shown))
        return GroupInputs(group, cast(Iterable[Tensor], shown))

    def groups_of(self, layer: int) -> list[str]:
        """The groups of a layer, its experts as one, in its order of execution."""
        return list(self._by_layer.get(layer, ()))

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
            if isinstance(batch, Batch):
                batch.layer, batch.entry = index, Entry(module, args, kwargs)
                batch.park()
                batch.entry = None

        return park

    def _at_norm(self, group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, Batch) and batch.stream.parks_at_groups:
                batch.norm_inputs[group] = inputs[0]

        return keep

    def _at_experts(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def show(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            batch = greenlet.getcurrent()
            if isinstance(batch, Pass):
                batch.show(name, Routed(inputs[0], inputs[1]))

        return show

    def _at_linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor] | None]:
        group = self._groups[name]
        args = self._activations.get(name)
        parks = group in self._order

        def visit(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            batch = greenlet.getcurrent()
            if not isinstance(batch, Pass):
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
            if args is None or not batch.stream.quantizes_activations:
                return None
            if shared.quantized is None:
                shared.quantized = fake_quantize(inputs[0], args, self.fixed_inputs.get(name))
            return (shared.quantized,)

        return visit


def running_stream() -> Stream | None:
    """The stream whose batch passes through the model here; None in a rehearsal, and outside of streams."""
    batch = greenlet.getcurrent()
    return batch.stream if isinstance(batch, Batch) else None


def _not_shared(name: str, group: str) -> PlanError:
    return PlanError(
        Problem(
            "plan_mismatch",
            f"{name} was planned to read the same tensor as {group}, and reads another one.",
            "The plan's table of shared inputs does not fit this model; please report its config.json.",
        )
    )
