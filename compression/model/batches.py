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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import greenlet
import torch
from torch import Tensor, nn

from compression.model.experts import Routed
from compression.model.hooks import ForwardHooks
from compression.model.spill import Spill, release
from compression.model.suspended import Rehearsal, Role, SuspendedBatch


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


class SuspendedBatches:
    """Batches that pass through the model side by side, in one role (calibration, original, compressed).

    tokens: int64 [batch, seq] of each. Every batch is parked at the entry of layer 0 at first.

    With a `spill`, the hidden states of batches that are parked between layers lie in its file, and a layer's
    groups are shown by rehearsals; without, in memory, and batches stop at groups on their way.
    """

    def __init__(
        self,
        hooks: ForwardHooks,
        tokens: Sequence[Tensor],
        *,
        quantize_activations: bool,
        spill: Spill | None = None,
    ) -> None:
        self._hooks = hooks
        self._spill = spill
        self.role = Role(quantize_activations)
        module, device = hooks.model.module, hooks.model.device
        self._batches = [
            SuspendedBatch(module, each.to(device), self.role, spill.new_slot() if spill else 0)
            for each in tokens
        ]
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
            for group in self._hooks.groups_of(layer):
                yield self._inputs(group, self.rehearsed(layer, group))
            return
        self.role.parks_at_groups = True
        self._resume([batch for batch in self._batches if batch.layer == layer])
        while waiting := [batch for batch in self._batches if batch.group is not None]:
            group = min((batch.group for batch in waiting if batch.group), key=self._hooks.order)
            before = [batch for batch in waiting if batch.group == group]
            yield self._inputs(group, [batch.shown for batch in before if batch.shown is not None])
            self._resume(before)
        self.role.parks_at_groups = False

    def rehearsed(self, layer: int, group: str) -> Iterable[Tensor | Routed]:
        """What batches at the entry of a layer would hand to one of its groups; made anew at each going."""
        return _Rehearsed(self, layer, group)

    def rehearse(self, layer: int, group: str) -> Iterator[Tensor | Routed]:
        """Run every batch from the entry of a layer to one of its groups, one batch at a time.

        What is shown stays what it is when the next batch runs. A group without a norm before it, as in
        OLMo 2, reads the hidden state itself, whose memory is given back then: it gets a copy.
        """
        for batch in self._batches:
            if batch.layer != layer:
                continue
            self._bring_back(batch)
            rehearsal = Rehearsal(batch, group)
            try:
                rehearsal.switch()
                shown = rehearsal.shown
                assert batch.entry is not None  # it waits at the layer
                if isinstance(shown, Tensor) and _same_storage(shown, batch.entry.hidden_state):
                    shown = shown.clone()
                if shown is not None:
                    yield shown
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

    def _finished(self, batch: SuspendedBatch) -> tuple[Tensor, Tensor]:
        self._bring_back(batch)
        batch.switch()
        assert batch.logits is not None
        return batch.logits, batch.tokens

    def _resume(self, batches: list[SuspendedBatch]) -> None:
        for batch in batches:
            batch.group = None
            self._bring_back(batch)
            before = batch.entry
            batch.switch()
            assert not torch.is_grad_enabled()
            after = batch.entry
            if (
                self._spill
                and before
                and not (after and _same_storage(before.hidden_state, after.hidden_state))
            ):
                release(before.hidden_state)
            self._put_away(batch)

    def _inputs(self, group: str, shown: Iterable[Tensor | Routed]) -> GroupInputs | ExpertsInputs:
        if self._hooks.is_experts(group):
            return ExpertsInputs(group, cast("Iterable[Routed]", shown))
        return GroupInputs(group, cast("Iterable[Tensor]", shown))

    def _put_away(self, batch: SuspendedBatch, *, changed: bool = True) -> None:
        if self._spill and batch.entry:
            self._spill.put_away(batch.entry.hidden_state, batch.slot, changed=changed)

    def _bring_back(self, batch: SuspendedBatch) -> None:
        if self._spill and batch.entry:
            self._spill.bring_back(batch.entry.hidden_state, batch.slot)


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class _Rehearsed(Iterable[Tensor | Routed]):
    """The inputs of a group, made anew each time they are gone through."""

    def __init__(self, batches: SuspendedBatches, layer: int, group: str) -> None:
        self._batches, self._layer, self._group = batches, layer, group

    def __iter__(self) -> Iterator[Tensor | Routed]:
        return self._batches.rehearse(self._layer, self._group)
