"""The statistics of a layer's experts: each expert is solved for the tokens that are routed to it.

Batches are parked before the experts and hand over what all of them read, and the routing. A sweep goes
through the batches once and takes the Gram matrices of a few experts, as many as the plan has memory for;
one, where batches wait in memory and a sweep costs nothing:

    sweep ─▶ Grams of gate and up of experts 0 .. k ─▶ solved ─▶ sweep ─▶ of experts k+1 .. 2k ─▶ ...
    sweep ─▶ Grams of down of experts 0 .. k, behind the gate and up that were solved ─▶ ...

An expert that sees fewer tokens than its input has columns is starved: from those alone rounding would follow
a few tokens' noise. Its Gram is filled up with what it would see if all tokens were routed to it (`fill_up`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from compression.math.gram import Gram, GramAccumulator, fill_up
from compression.model.experts import Experts, Routed, Stage


class ExpertGrams:
    """The Gram matrices of one layer's experts, made in sweeps over `inputs`.

    at_once: how many experts a sweep serves. Grams are asked for in the order of the experts, those of gate
    and up before those of down.
    """

    def __init__(self, experts: Experts, inputs: Iterable[Routed], at_once: int) -> None:
        self._experts = experts
        self._inputs = inputs
        self._at_once = at_once
        self._ready: dict[tuple[Stage, int], Gram] = {}
        self._block: Gram | None = None

    def rows(self, stage: Stage, expert: int) -> Iterator[Tensor]:
        """What one expert's linears read in each batch, [rows, in]; there may be no rows."""
        for routed in self._inputs:
            yield self._own(stage, expert, routed)

    def gram(self, stage: Stage, expert: int) -> Gram:
        """Statistics of what one expert's linears read, filled up where it is starved."""
        if (stage, expert) not in self._ready:
            served = range(expert, min(expert + self._at_once, len(self._experts)))
            self._ready = {(stage, e): gram for e, gram in self._take(stage, served).items()}
        return self._ready.pop((stage, expert))

    def _take(self, stage: Stage, experts: Iterable[int]) -> dict[int, Gram]:
        own = self._sweep({e: partial(self._own, stage, e) for e in experts})
        columns = self._experts.expert(0).columns(stage)
        starved = [e for e, gram in own.items() if gram is None or gram.tokens < columns]
        everyone = self._everyone(stage, starved)
        for expert in starved:
            own[expert] = fill_up(own[expert], everyone.pop(expert))
        return {e: gram for e, gram in own.items() if gram is not None}

    def _everyone(self, stage: Stage, experts: Sequence[int]) -> dict[int, Gram]:
        """What each expert would see if all tokens were routed to it. Gate and up of all see the same."""
        if not experts:
            return {}
        if stage == "gate_up":
            if self._block is None:
                self._block = self._sweep({0: partial(self._any, stage, 0)})[0]
            assert self._block is not None  # batches have tokens
            return dict.fromkeys(experts, self._block)
        self._block = None
        grams = self._sweep({e: partial(self._any, stage, e) for e in experts})
        return {e: gram for e, gram in grams.items() if gram is not None}

    def _own(self, stage: Stage, expert: int, routed: Routed) -> Tensor:
        """What an expert's linears read in one batch."""
        return self._read(stage, expert, routed.rows_of(expert))

    def _any(self, stage: Stage, expert: int, routed: Routed) -> Tensor:
        """What they would read if all tokens were routed to it."""
        return self._read(stage, expert, routed.hidden_states)

    def _read(self, stage: Stage, expert: int, hidden_states: Tensor) -> Tensor:
        if stage == "gate_up":
            return hidden_states
        return self._experts.expert(expert).inner_states(hidden_states)

    def _sweep(self, wanted: Mapping[int, Callable[[Routed], Tensor]]) -> dict[int, Gram | None]:
        accumulators = {key: GramAccumulator() for key in wanted}
        for routed in self._inputs:
            for key, read in wanted.items():
                accumulators[key].add(read(routed))
        return {key: accumulator.finish() for key, accumulator in accumulators.items()}


@dataclass(frozen=True)
class ExpertInputs(Iterable[Tensor]):
    """What some linears of one expert read in each batch, [rows, in]."""

    grams: ExpertGrams
    stage: Stage
    expert: int

    def __iter__(self) -> Iterator[Tensor]:
        return self.grams.rows(self.stage, self.expert)

    def gram(self) -> Gram:
        return self.grams.gram(self.stage, self.expert)
