"""Runs of the model, or of one layer, that can be suspended: a greenlet each. batches.py says what for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import greenlet
from torch import Tensor, nn

from compression.model.experts import Routed


@dataclass(eq=False)
class Role:
    """What all batches of one kind have in common: those of calibration, of the original, of the compressed
    model.

    quantizes_activations: whether linears read their inputs as a server quantizes them. parks_at_groups:
    whether batches park where the first linear of a group wants its input.
    """

    quantizes_activations: bool
    parks_at_groups: bool = False


@dataclass
class SharedInput:
    """The tensor that a group reads in one batch, until its last member has read it.

    norm_input: what the norm was given that made it, where scales are to be folded into that norm.
    """

    tensor: Tensor
    norm_input: Tensor | None
    quantized: Tensor | None
    readers_left: int


class SuspendedRun(greenlet.greenlet):
    """A run through a part of the model that can park.

    group: before which group it is parked, or before which module of experts. shown: what it hands over
    there. parks_at: whether to park where the first linear of a group wants its input.
    """

    def __init__(self, role: Role, parks_at: Callable[[str], bool]) -> None:
        super().__init__()
        self.role = role
        self.parks_at = parks_at
        self.group: str | None = None
        self.shown: Tensor | Routed | None = None
        self.shared: dict[str, SharedInput] = {}
        self.norm_inputs: dict[str, Tensor] = {}

    def park(self) -> None:
        """Go back to the main loop until it switches here again."""
        assert self.parent is not None
        self.parent.switch()

    def show(self, group: str, inputs: Tensor | Routed) -> None:
        """Park before a group, if that is wanted, its input in hand."""
        if self.parks_at(group):
            self.group, self.shown = group, inputs
            self.park()
            self.shown = None


class SuspendedBatch(SuspendedRun):
    """One batch's forward pass. `layer`: at whose entry it is parked; `entry`: what it gives that layer."""

    def __init__(self, module: nn.Module, tokens: Tensor, role: Role, slot: int) -> None:
        super().__init__(role, lambda _group: role.parks_at_groups)
        self.module = module
        self.slot = slot
        self.tokens = tokens
        self.layer = -1
        self.entry: LayerCall | None = None
        self.logits: Tensor | None = None

    def run(self) -> None:
        self.logits = self.module(input_ids=self.tokens, use_cache=False).logits


class LayerCall(NamedTuple):
    """A call of a decoder layer that has not begun yet. Its first argument is the hidden state."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_state(self) -> Tensor:
        state: Tensor = self.args[0]
        return state


class Rehearsal(SuspendedRun):
    """A run of one layer up to one group, whose input it shows, and no further."""

    def __init__(self, batch: SuspendedBatch, group: str) -> None:
        super().__init__(batch.role, lambda wanted: wanted == group)
        assert batch.entry is not None
        self._entry = batch.entry

    def run(self) -> None:
        self._entry.layer(*self._entry.args, **self._entry.kwargs)
