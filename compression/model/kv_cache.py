"""Keys and values as a server caches them: their ranges learned, their rounding simulated.

Attention modules are called without a cache. In its place a hook hands them this one, which keeps nothing: it
looks at the keys and values (after rotary embedding, of the key and value heads only) that a batch would put
into a cache, and gives them back, rounded where the compressed model is measured. compressed-tensors does the
same when Transformers runs the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compression.checkpoint.reader import TORCH_DTYPES
from compression.math.finite import require_finite_input_scale
from compression.math.grid import fake_quantize, fixed_input_scale
from compression.model.hooks import running_role
from compression.model.suspended import Role
from compression.planning.plans import CachePlan
from compression.schemes import KV_CACHE


class KVCache:
    """Stands in for the cache of every attention module of a model, one layer of which runs at a time.

    learns_from: the role of the batches whose keys and values decide the scales, all of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.learns_from: Role | None = None
        self._largest: dict[str, Tensor] = {}
        self._scales: Mapping[str, Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._stand_in, with_kwargs=True) for module in modules
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: keys, values [batch, heads, seq, head_dim]."""
        role = running_role()
        if role is not None and role.quantizes_activations:
            return self._rounded("k", keys), self._rounded("v", values)
        if role is not None and role is self.learns_from:
            self._see("k", keys)
            self._see("v", values)
        return keys, values

    def get_seq_length(self, _layer: int = 0) -> int:
        """Tokens in the cache: none, every batch begins with its first."""
        return 0

    def learned(self, planned: CachePlan) -> dict[str, Tensor]:
        """The scales of the layer that has been passed, [1], by their names on disk.

        Raises:
            NumericalError: `non_finite_activations`.
        """
        dtype = TORCH_DTYPES[planned.dtype]
        largest, self._largest = self._largest, {}
        scales = {kind: fixed_input_scale(largest[kind], KV_CACHE, dtype) for kind in ("k", "v")}
        for scale in scales.values():
            require_finite_input_scale(f"the KV cache of {planned.attention}", scale)
        return {f"{planned.attention}.{kind}_scale": scale for kind, scale in scales.items()}

    def use(self, planned: CachePlan, stored: Mapping[str, Tensor]) -> None:
        """Round with the scales that are stored for the layer that is about to run."""
        self._scales = {kind: stored[f"{planned.attention}.{kind}_scale"] for kind in ("k", "v")}

    def _rounded(self, kind: str, states: Tensor) -> Tensor:
        return fake_quantize(states, KV_CACHE, self._scales[kind].to(states.device))

    def _see(self, kind: str, states: Tensor) -> None:
        largest = states.abs().amax()
        self._largest[kind] = torch.maximum(self._largest.get(kind, largest), largest)

    def _stand_in(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "past_key_values": self}
