"""The guide's rules for memory: what a compressor takes that holds the whole model on the host.

LLM Compressor's guide ("Memory requirements") gives them, for any implementation of these methods:

    host        parameters x 2 bytes
    rtn         max(layer, tower)
    gptq        max(layer, tower) x 2: the Hessians of a layer are about as large as the layer
    sparsegpt   as gptq
    awq         max(layer + activations, tower)

    activations = norms x samples x seq_len x hidden_size x 2 bytes; one norm's, where they are offloaded
    tower       the vision tower, which lies on the GPU whole

All in whole bytes, so that nothing is lost before a figure is printed. What this engine itself takes is
another matter: `compression.planning.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Any

from compression.checkpoint.sizes import layers, parameters, vision_tower
from compression.checkpoint.tensors import StoredTensor
from compression.methods import GuideRule, method_of
from compression.recipe import Calibration, Recipe

NOMINAL_ITEMSIZE = 2
"""Bytes of a parameter and of an activation, whatever the checkpoint's dtype."""
HESSIAN_FACTOR = 2
"""A layer and its Hessians, in sizes of the layer."""


@dataclass(frozen=True)
class GuideModel:
    """What the rules need to know of a model.

    parameters: all of them, nominal ("8B") or counted. layer_bytes: one text decoder layer; tower_bytes: the
    vision tower, 0 without. num_norms: norms of a layer whose activations awq captures.
    """

    parameters: int
    layer_bytes: int
    num_norms: int
    hidden_size: int
    tower_bytes: int = 0

    @classmethod
    def of(
        cls, tensors: Mapping[str, StoredTensor], *, layers_prefix: str, num_layers: int, hidden_size: int
    ) -> GuideModel:
        """Counted from headers: nothing is nominal and nothing is rounded.

        The layer is the largest of the decoder's, and its norms are the modules with "norm" in their name.
        """
        layer = max(layers(tensors, layers_prefix, num_layers).values(), key=parameters)
        modules = {info.name.rpartition(".")[0].rpartition(".")[2] for info in layer}
        return cls(
            parameters=parameters(tensors.values()),
            layer_bytes=NOMINAL_ITEMSIZE * parameters(layer),
            num_norms=sum("norm" in module for module in modules),
            hidden_size=hidden_size,
            tower_bytes=NOMINAL_ITEMSIZE * parameters(vision_tower(tensors)),
        )


@dataclass(frozen=True)
class GuideEstimate:
    """The rules applied. samples, seq_len: of the calibration; offloads: AWQ's offload_device is set."""

    model: GuideModel
    method: GuideRule
    samples: int
    seq_len: int
    offloads: bool = False

    @property
    def host_bytes(self) -> int:
        return NOMINAL_ITEMSIZE * self.model.parameters

    @property
    def activation_bytes(self) -> int:
        """What awq captures of one layer; 0 for the other methods."""
        if self.method != "awq":
            return 0
        norms = 1 if self.offloads else self.model.num_norms
        return norms * self.samples * self.seq_len * self.model.hidden_size * NOMINAL_ITEMSIZE

    @property
    def gpu_bytes(self) -> int:
        layer, tower = self.model.layer_bytes, self.model.tower_bytes
        if self.method == "awq":
            return max(layer + self.activation_bytes, tower)
        return max(layer, tower) * (1 if self.method == "rtn" else HESSIAN_FACTOR)

    @property
    def tower_and_activations_bytes(self) -> int | None:
        """What the guide prints for awq on a model with a vision tower, against its own formula."""
        if self.method != "awq" or not self.model.tower_bytes:
            return None
        return self.model.tower_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON: the sums, and every part with where it is."""
        model = self.model
        layer, tower = model.layer_bytes, model.tower_bytes
        norms = "1 norm at a time" if self.offloads else f"{model.num_norms} norms"
        items = [
            ("model", "host", self.host_bytes, f"{model.parameters} parameters x {NOMINAL_ITEMSIZE} bytes"),
            ("layer", "gpu", layer, f"the largest decoder layer, {NOMINAL_ITEMSIZE} bytes a parameter"),
        ]
        if tower:
            items.append(("vision tower", "gpu", tower, "whole, at another time than a layer"))
        if self.method in ("gptq", "sparsegpt"):
            items.append(("Hessians", "gpu", max(layer, tower), "as large as what is on the GPU"))
        if self.method == "awq":
            basis = (
                f"{norms} x {self.samples} samples x {self.seq_len} tokens x {model.hidden_size} x 2 bytes"
            )
            items.append(("activations", "gpu", self.activation_bytes, basis))
        return {
            "basis": "guide",
            "method": self.method,
            "host_bytes": self.host_bytes,
            "gpu_bytes": self.gpu_bytes,
            "items": [
                {"name": name, "on": place, "bytes": size, "basis": basis}
                for name, place, size, basis in items
            ],
        }


def guide_estimate(model: GuideModel, recipe: Recipe, calibration: Calibration) -> GuideEstimate:
    """The guide's figures for a job: of its steps' rules, the one that takes most."""
    estimates = [
        GuideEstimate(
            model,
            method_of(step).guide_rule,
            calibration.num_calibration_samples,
            calibration.max_seq_length,
            getattr(step, "offload_device", None) is not None,
        )
        for step in recipe.steps
    ]
    return max(estimates, key=lambda estimate: estimate.gpu_bytes)


def gigabytes(nbytes: int, digits: int) -> Decimal:
    """Decimal GB, truncated to `digits` places as the guide prints them."""
    return (Decimal(nbytes) / 10**9).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_DOWN)
