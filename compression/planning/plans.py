"""What a plan says: of every linear, every norm, every decoder layer, and of the job.

`compression.planning.planner.plan` makes them; the rest of the engine, the report and the API read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.layout import TensorSpec
from compression.errors import Problem
from compression.methods import method_of
from compression.planning.cost import DiskEstimate, Duration
from compression.planning.guide import GuideEstimate
from compression.planning.memory import MemoryEstimate, Workload, estimate
from compression.recipe import Calibration, Evaluation, Recipe
from compression.schemes import Scheme

T = TypeVar("T")


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one linear.

    key: its weight's name. shape: (out, in). scheme: with its group size resolved; None = stored in
    its own dtype, for `reason`. step, pruning: their positions in the recipe. layer: None outside the layers.
    group: name of the first linear that reads the same input. experts: name of the module of which it is a
    part of one expert, "" where it is none.
    """

    name: str
    key: str
    shape: tuple[int, int]
    dtype: str
    scheme: Scheme | None
    step: int | None
    pruning: int | None
    layer: int | None
    group: str
    experts: str = ""
    reason: str = ""

    @property
    def compressed(self) -> bool:
        """Whether any step changes it."""
        return self.scheme is not None or self.pruning is not None

    def solved_with(self, recipe: Recipe) -> str:
        """What it has in common with those it is solved with, of the linears that read its input and become
        the same: one stacked matrix. Several are solved together where that saves time, or where vLLM makes
        one matrix of them that has one scale (docs/adr/0010-one-scale-for-what-vllm-fuses.md)."""
        if self.scheme is None or self.step is None:
            return ""
        weights = self.scheme.weights
        if weights.block_structure:
            return self.name  # its last block of rows may be cut short
        if weights.strategy in ("tensor", "tensor_group"):
            return self.name.rpartition(".")[0]
        together = method_of(recipe.quantizing[self.step]).solves_together or self.pruning is not None
        return "" if together else self.name

    def to_dict(self) -> dict[str, Any]:
        scheme = self.scheme
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "scheme": scheme.name if scheme else None,
            "group_size": scheme.weights.group_size if scheme else None,
            "step": self.step,
            "pruning": self.pruning,
            "group": self.group,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class FoldPlan:
    """A norm that scales are folded into, and the group of linears that alone reads its output.

    keys: the norm's tensors. offset: what it adds to its weight before it multiplies with it.
    """

    group: str
    norm: str
    keys: tuple[str, ...]
    offset: int


@dataclass(frozen=True)
class LinearFoldPlan:
    """A linear whose last `rows` outputs make the input of a group, channel by channel: v to o, up to down.

    keys: its bias, where it has one. head_dim: of grouped-query attention, where each head of the linear is
    read by several in the group's input.
    """

    group: str
    linear: str
    keys: tuple[str, ...]
    rows: int
    head_dim: int


@dataclass(frozen=True)
class CachePlan:
    """Scales of a layer's keys and values: attention: module under whose name they are stored, in `dtype`."""

    attention: str
    dtype: str

    def stored(self) -> dict[str, TensorSpec]:
        """What is stored, by full name."""
        return {f"{self.attention}.{kind}_scale": TensorSpec(self.dtype, (1,)) for kind in ("k", "v")}


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: its compressed linears in forward order, the keys copied as they are, its file.

    prefix: of its names in the model; prefix_on_disk: of the same names in files, source and output alike.
    folds: the norms that change, by the group that reads them. linear_folds: the linears whose rows are
    scaled for the sake of others, in forward order. cache: None where keys and values stay.
    """

    index: int
    prefix: str
    prefix_on_disk: str
    modules: tuple[ModulePlan, ...]
    copied: tuple[str, ...]
    shard: str
    folds: Mapping[str, FoldPlan]
    linear_folds: tuple[LinearFoldPlan, ...] = ()
    cache: CachePlan | None = None

    @property
    def folded(self) -> tuple[str, ...]:
        """Keys of the norms and biases that change."""
        norms = (key for fold in self.folds.values() for key in fold.keys)
        return (*norms, *(key for fold in self.linear_folds for key in fold.keys))

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Keys that keep their dtype and shape."""
        return self.copied + self.folded

    def on_disk(self, named: Mapping[str, T]) -> dict[str, T]:
        """What is named as in the model, under the names on disk."""
        return _renamed(named, self.prefix, self.prefix_on_disk)

    def in_model(self, stored: Mapping[str, T]) -> dict[str, T]:
        """What is named as on disk, under the names in the model."""
        return _renamed(stored, self.prefix_on_disk, self.prefix)


def _renamed(named: Mapping[str, T], old: str, new: str) -> dict[str, T]:
    return {new + name.removeprefix(old): value for name, value in named.items()}


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide.

    name: what the model is called. recipe: with every step's observer written out. layers_prefix: what stands
    before a layer's number in names. outside: shard file and keys of what is in no layer: embeddings and the
    like, the `tower` that reads images, and `unknown` tensors, which the model does not have; all are copied.
    kept: linears that stay as they are; ignore: names of all that are not quantized, as readers know them.
    output_bytes: exact size of all shards. calibrates: whether a step learns from data. workload: the sizes
    that the estimates are made from. guide: memory by the guide's rules; `memory` is that of this engine.
    disk: what a run needs in its output folder. duration: how long it takes.
    """

    source: Path
    name: str
    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration
    evaluation: Evaluation
    model_type: str
    architecture: str
    layers_prefix: str
    layers: tuple[LayerPlan, ...]
    outside: tuple[tuple[str, tuple[str, ...]], ...]
    tower: tuple[str, ...]
    unknown: tuple[str, ...]
    kept: tuple[ModulePlan, ...]
    ignore: tuple[str, ...]
    warnings: tuple[Problem, ...]
    workload: Workload
    guide: GuideEstimate
    disk: DiskEstimate
    duration: Duration
    source_bytes: int
    output_bytes: int
    parameters: int
    compressed_parameters: int
    calibrates: bool

    @property
    def memory(self) -> MemoryEstimate:
        """The peak of a run that computes in float32, which takes most."""
        return estimate(self.workload)

    @property
    def spill_bytes(self) -> int:
        """Hidden states on disk; 0 where they stay in memory."""
        return self.workload.spill_bytes

    @property
    def experts_at_once(self) -> int:
        """Of how many experts Gram matrices are held together; 0 without experts or data."""
        return self.workload.experts_at_once

    @property
    def tower_bytes(self) -> int:
        """Bytes of what reads images, on disk, in the source and in the output."""
        return sum(self.checkpoint.tensors[name].nbytes for name in self.tower)

    def to_dict(self) -> dict[str, Any]:
        """JSON for people and programs; no path of this machine."""
        return {
            "source": self.name,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json") if self.calibrates else None,
            "evaluation": self.evaluation.model_dump(mode="json"),
            "layers": len(self.layers),
            "modules": [module.to_dict() for layer in self.layers for module in layer.modules],
            "kept": [module.to_dict() for module in self.kept],
            "tower_bytes": self.tower_bytes,
            "unknown_tensors": list(self.unknown),
            "warnings": [
                {"code": warning.code, "message": warning.message, "hint": warning.hint}
                for warning in self.warnings
            ],
            "memory": {"exact": self.memory.to_dict(), "guide": self.guide.to_dict()},
            "experts_at_once": self.experts_at_once,
            "disk": self.disk.to_dict(),
            "duration": self.duration.to_dict(),
            "spill_bytes": self.spill_bytes,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "parameters": self.parameters,
            "compressed_parameters": self.compressed_parameters,
        }
