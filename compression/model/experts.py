"""Experts, one linear each: what Transformers fuses into stacked parameters is taken apart again.

Transformers 5 computes all experts of a layer from two parameters, [experts, 2 x inner, hidden] and
[experts, hidden, inner], which no hook on a linear sees, while checkpoints hold every expert by itself. On
the empty model, before anything is loaded, the module with those parameters is replaced by one that holds
the linears under their names on disk:

    mlp.experts   gate_up_proj, down_proj   ─▶   block_sparse_moe.experts.0   w1, w3, w2
                                                 block_sparse_moe.experts.1   w1, w3, w2   ...

The router stays as it is. The function is that of Transformers' eager implementation, to the rounding of
matrix products of another shape.

Llama 4 scales what experts read, not what they make, and its block shows every expert every token, times a
score that is 0 for all but a few: `ScaledInputs` runs it with the few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compression.errors import PlanError, Problem
from compression.families.structure import ExpertsSpec

Stage = Literal["gate_up", "down"]
"""Linears of an expert that read one tensor."""


@dataclass(frozen=True)
class Routed:
    """What a layer's experts read in one batch, and who reads what.

    hidden_states: [tokens, hidden]. top_k_index: int64 [tokens, k], the experts of each token; numbers that
    belong to no expert mean none. count: of experts.
    """

    hidden_states: Tensor
    top_k_index: Tensor
    count: int

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(place among its token's experts, token) for each row of the expert's input, both int64 [rows]."""
        return self._by_expert[expert]

    def rows_of(self, expert: int) -> Tensor:
        """The expert's input, [rows, hidden]."""
        return self.hidden_states[self.tokens_of(expert)[1]]

    @cached_property
    def _by_expert(self) -> list[tuple[Tensor, Tensor]]:
        """`tokens_of` of every expert, by one sort: a GPU has to be waited for once, not once an expert."""
        chosen, order = self.top_k_index.t().flatten().sort(stable=True)
        numbers = torch.arange(self.count + 1, device=chosen.device)
        bounds: list[int] = torch.searchsorted(chosen, numbers).tolist()
        tokens = len(self.top_k_index)
        place, token = order.div(tokens, rounding_mode="floor"), order.remainder(tokens)
        return [(place[start:stop], token[start:stop]) for start, stop in pairwise(bounds)]


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)). The linears have the names that they have on disk."""

    def __init__(self, spec: ExpertsSpec, hidden: int, inner: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._gate, self._up = spec.gate_up
        self._down = spec.down
        self._act = act
        for name in spec.gate_up:
            self.add_module(name, nn.Linear(hidden, inner, bias=False))
        self.add_module(spec.down, nn.Linear(inner, hidden, bias=False))

    def stage(self, linear: str) -> Stage:
        """Of one of its linears."""
        return "down" if linear == self._down else "gate_up"

    def columns(self, stage: Stage) -> int:
        """Width of what the linears of a stage read."""
        linear = self.get_submodule(self._down if stage == "down" else self._gate)
        assert isinstance(linear, nn.Linear)
        return linear.in_features

    def inner_states(self, hidden_states: Tensor) -> Tensor:
        """What the down projection reads, [rows, inner], for hidden_states [rows, hidden]."""
        gate: Tensor = self.get_submodule(self._gate)(hidden_states)
        up: Tensor = self.get_submodule(self._up)(hidden_states)
        return self._act(gate) * up

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.get_submodule(self._down)(self.inner_states(hidden_states))
        return result


class Experts(nn.ModuleList):
    """All experts of a layer, in the place and with the arguments of the fused module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | Routed, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; top_k_index, top_k_weights [tokens, k]. Gives [tokens, hidden].

        In place of top_k_index a hook may hand over what it has made of it, so that it is sorted once.
        """
        if hidden_states.is_meta:
            return self._on_meta(hidden_states)
        result = torch.zeros_like(hidden_states)
        routed = top_k_index
        if not isinstance(routed, Routed):
            routed = Routed(hidden_states, routed, len(self))
        for number in range(len(self)):
            place, token = routed.tokens_of(number)
            if len(token) == 0:
                continue
            weighed = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            result.index_add_(0, token, weighed.to(result.dtype))
        return result

    def expert(self, number: int) -> Expert:
        """One of them."""
        expert = self[number]
        assert isinstance(expert, Expert)
        return expert

    def _on_meta(self, hidden_states: Tensor) -> Tensor:
        """Without values there is no routing: every expert is shown every token, in a tensor of its own."""
        result = torch.zeros_like(hidden_states)
        for expert in self:
            result += expert(hidden_states[:])
        return result


class ScaledInputs(nn.Module):
    """Llama 4's block: a shared expert, and experts that read tokens times the router's score.

    Transformers hands each expert all tokens, most of them times 0, and holds 2 x experts x hidden numbers a
    token. Here each gets the tokens that it was chosen for, already scaled.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self._top_k = block.top_k
        self.router = block.router
        self.experts = block.experts
        self.shared_expert = block.shared_expert

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [batch, seq, hidden]. Gives [tokens, hidden], and logits [tokens, experts]."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(hidden_states)
        routed = self._routed(hidden_states, scores, logits)
        return self.shared_expert(hidden_states) + routed, logits

    def _routed(self, hidden_states: Tensor, scores: Tensor, logits: Tensor) -> Tensor:
        """What the experts make, [tokens, hidden]."""
        chosen = logits.topk(self._top_k, dim=-1).indices
        scores = scores.gather(-1, chosen)
        scaled = (hidden_states[:, None] * scores[..., None]).flatten(0, 1)
        made: Tensor = self.experts(scaled, chosen.view(-1, 1), torch.ones_like(scores).view(-1, 1))
        return made.view(*chosen.shape, -1).sum(1)


def unfuse(layer: nn.Module, spec: ExpertsSpec) -> None:
    """Take a decoder layer's experts apart, in place; their names become those on disk. A layer without
    experts stays as it is.

    Raises:
        PlanError: `plan_mismatch`, where the layer's experts are not of the layout that this adapter knows.
    """
    holders = [name for name, child in layer.named_children() if hasattr(child, "experts")]
    if not holders:
        return
    block_name = spec.name.rpartition(".")[0]
    block = _rename_child(layer, holders[0], block_name)
    fused: Any = block.experts
    _check_layout(fused, spec)
    _, inner, hidden = fused.down_proj.shape if spec.scales_inputs else fused.down_proj.mT.shape
    with torch.device(fused.down_proj.device):
        experts = [Expert(spec, hidden, inner, fused.act_fn) for _ in range(fused.num_experts)]
    block.experts = Experts(experts).to(fused.down_proj.dtype).requires_grad_(False).eval()
    if spec.scales_inputs:
        setattr(layer, block_name, ScaledInputs(block).eval())


def _rename_child(module: nn.Module, old: str, new: str) -> nn.Module:
    """Register a child under another name; the module's own code finds it under the old one as before."""
    child = module.get_submodule(old)
    if old != new:
        delattr(module, old)
        module.add_module(new, child)
        module.__dict__[old] = child  # an attribute, not a registered module
    return child


def _check_layout(fused: nn.Module, spec: ExpertsSpec) -> None:
    """Whether the module is gate and up stacked along their outputs, without biases, silu or another act."""
    shapes = {name: parameter.shape for name, parameter in fused.named_parameters()}
    gate = getattr(type(fused), "_apply_gate", None)
    if shapes.keys() != {"gate_up_proj", "down_proj"}:
        known = False
    elif spec.scales_inputs:  # Llama 4's module does not say itself how it is laid out
        count, inner, hidden = shapes["down_proj"]
        known = shapes["gate_up_proj"] == (count, hidden, 2 * inner)
    else:
        known = (
            not getattr(fused, "is_transposed", True)
            and getattr(fused, "is_concatenated", False)
            and getattr(gate, "__name__", "") == "_default_apply_gate"
        )
    if not known:
        raise PlanError(
            Problem(
                "plan_mismatch",
                f"The experts in {spec.name} are not laid out as planned: {', '.join(sorted(shapes))}.",
                "This is a fault of Bitmill's tables; please report it with the model's config.json.",
            )
        )
