"""Recipe x checkpoint headers -> Plan: what becomes of every tensor, decided before any compute.

Imports neither torch nor transformers, reads no tensor data, and takes milliseconds: the control plane
plans at submission. What cannot succeed is refused here, with every reason at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression import checks
from compression.checkpoint.headers import Checkpoint, read_checkpoint
from compression.checkpoint.layout import TensorSpec, file_size
from compression.errors import PlanError, Problem, SourceError
from compression.families import LM_HEAD, Decoder, read_decoder
from compression.memory import (
    ACTIVATION_BUDGET_BYTES,
    COMPUTE_ITEMSIZE,
    MemoryEstimate,
    ParkedTokens,
    Workload,
    activation_bytes,
    estimate,
)
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.schemes import Scheme
from compression.treatment import Linear, Treatment, treat

MAX_OUTSIDE_SHARD_BYTES = 5_000_000_000
METADATA_BYTES = 1 << 20
"""Allowance on disk for config, index, card, recipe and report."""


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one linear.

    key: its weight's name on disk. shape: (out, in). scheme: with its group size resolved; None = stored in
    its own dtype, for `reason`. step, pruning: their positions in the recipe. layer: None outside the layers.
    group: name of the first linear that reads the same input.
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
    reason: str = ""

    @property
    def compressed(self) -> bool:
        """Whether any step changes it."""
        return self.scheme is not None or self.pruning is not None

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
class LayerPlan:
    """One decoder layer: its compressed linears in forward order, the keys copied as they are, its file.

    folds: the norms that change, by the group that reads them.
    """

    index: int
    prefix: str
    modules: tuple[ModulePlan, ...]
    copied: tuple[str, ...]
    shard: str
    folds: Mapping[str, FoldPlan]

    @property
    def folded(self) -> tuple[str, ...]:
        """Keys of the norms that change."""
        return tuple(key for fold in self.folds.values() for key in fold.keys)

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Keys that keep their dtype and shape."""
        return self.copied + self.folded


@dataclass(frozen=True)
class Plan:
    """Everything that headers and recipe decide.

    recipe: with every step's observer written out. layers_prefix: what stands before a layer's number in
    names. outside: shard file and keys of what is in no layer, and of `unknown` tensors, which the model does
    not have and which are copied. kept: linears that stay as they are; ignore: names of all that are not
    quantized. output_bytes: exact size of all shards. calibrates: whether a step learns from data. memory:
    estimated peak. disk_bytes: what a run needs in its output folder; spill_bytes: the part of it for hidden
    states, 0 where they stay in memory.
    """

    source: Path
    checkpoint: Checkpoint
    recipe: Recipe
    calibration: Calibration
    evaluation: Evaluation
    model_type: str
    architecture: str
    layers_prefix: str
    layers: tuple[LayerPlan, ...]
    outside: tuple[tuple[str, tuple[str, ...]], ...]
    unknown: tuple[str, ...]
    kept: tuple[ModulePlan, ...]
    ignore: tuple[str, ...]
    warnings: tuple[Problem, ...]
    memory: MemoryEstimate
    disk_bytes: int
    spill_bytes: int
    source_bytes: int
    output_bytes: int
    parameters: int
    compressed_parameters: int
    calibrates: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON for people and programs; no path of this machine but the model folder's own name."""
        return {
            "source": self.source.name,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration": self.calibration.model_dump(mode="json") if self.calibrates else None,
            "evaluation": self.evaluation.model_dump(mode="json"),
            "layers": len(self.layers),
            "modules": [module.to_dict() for layer in self.layers for module in layer.modules],
            "kept": [module.to_dict() for module in self.kept],
            "unknown_tensors": list(self.unknown),
            "warnings": [
                {"code": warning.code, "message": warning.message, "hint": warning.hint}
                for warning in self.warnings
            ],
            "memory": self.memory.to_dict(),
            "disk_bytes": self.disk_bytes,
            "spill_bytes": self.spill_bytes,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "parameters": self.parameters,
            "compressed_parameters": self.compressed_parameters,
        }


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    dataset: DatasetSpec | None = None,
    calibration: Calibration = Calibration(),
    evaluation: Evaluation = Evaluation(),
    activation_budget_bytes: int = ACTIVATION_BUDGET_BYTES,
) -> Plan:
    """Decide everything that config.json and the safetensors headers allow to decide.

    Raises:
        PlanError: the job cannot succeed; `problems` has every reason that was found. What is wrong with the
            checkpoint's files has the codes of `read_checkpoint`.
    """
    has_data = dataset is not None
    recipe = checks.with_observers(recipe, has_data)
    problems = checks.recipe_problems(recipe, has_data)
    try:
        checkpoint = read_checkpoint(source)
    except SourceError as error:
        raise PlanError(Problem(error.code, error.message, error.hint, "/model"), *problems) from error
    warnings: list[Problem] = []
    problems = checks.source_problems(checkpoint, warnings) + problems
    decoder = read_decoder(checkpoint.config)
    if not isinstance(decoder, Decoder):
        raise PlanError(*problems, *decoder)
    expected = _expected(checkpoint, decoder)
    if not any(problem.code == "source_already_quantized" for problem in problems):
        problems += checks.tensor_problems(checkpoint, decoder, expected)
    treatment = treat(_linears(checkpoint, decoder), _leaf_modules(expected), recipe)
    problems += treatment.problems
    problems += checks.smoothing_problems(recipe, decoder)
    calibrates = has_data and recipe.needs_data
    if problems:
        raise PlanError(*problems)

    unknown = tuple(sorted(checkpoint.tensors.keys() - expected.keys()))
    modules = _module_plans(checkpoint, decoder, treatment)
    layers, outside = _shards(checkpoint, decoder, modules, unknown, recipe.smoothing is not None)
    stored = [_stored_layer(checkpoint, layer) for layer in layers]
    stored += [{key: checkpoint.tensors[key].spec for key in keys} for _, keys in outside]
    output_bytes = sum(map(file_size, stored))
    compressed = [module for module in modules if module.compressed]
    kept = tuple(module for module in modules if not module.compressed)
    parked = ParkedTokens.of(calibration, evaluation, calibrates=calibrates) if has_data else None
    held = activation_bytes(decoder.parked_width, COMPUTE_ITEMSIZE, parked) if parked else 0
    spill_bytes = 0
    if parked and held > activation_budget_bytes:
        spill_bytes = activation_bytes(decoder.hidden_size, COMPUTE_ITEMSIZE, parked)
    return Plan(
        source=Path(source),
        checkpoint=checkpoint,
        recipe=recipe,
        calibration=calibration,
        evaluation=evaluation,
        model_type=checkpoint.config["model_type"],
        architecture=decoder.family.architecture,
        layers_prefix=decoder.layers_prefix,
        layers=layers,
        outside=outside,
        unknown=unknown,
        kept=kept,
        ignore=tuple(module.name for module in modules if module.scheme is None),
        warnings=(
            *warnings,
            *treatment.warnings,
            *checks.dense_warnings(recipe),
            *checks.spill_warnings(held, activation_budget_bytes, spill_bytes),
            *checks.unknown_warnings(unknown),
        ),
        memory=estimate(
            _workload(checkpoint, decoder, layers, compressed, parked, calibrates, spill_bytes > 0)
        ),
        disk_bytes=output_bytes + _copied_bytes(checkpoint) + METADATA_BYTES + spill_bytes,
        spill_bytes=spill_bytes,
        source_bytes=checkpoint.weight_bytes,
        output_bytes=output_bytes,
        parameters=sum(info.spec.elements for info in checkpoint.tensors.values()),
        compressed_parameters=sum(math.prod(module.shape) for module in compressed),
        calibrates=calibrates,
    )


def stored_tensors(scheme: Scheme | None, shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """What a compressed linear [out, in] is on disk: suffix after "<name>." -> dtype and shape.

    dtype: that of the source's weight, in which scales are stored, and the weight itself without a scheme.
    """
    if scheme is None:
        return {"weight": TensorSpec(dtype, shape)}
    rows, columns = shape
    weights = scheme.weights
    groups = columns // weights.group_size if weights.group_size else 1
    if scheme.format == "pack-quantized":
        tensors = {
            "weight_packed": TensorSpec("I32", (rows, -(-columns * weights.num_bits // 32))),
            "weight_scale": TensorSpec(dtype, (rows, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }
        if not weights.symmetric:
            tensors["weight_zero_point"] = TensorSpec("I32", (-(-rows * weights.num_bits // 32), groups))
        return tensors
    codes = {"int-quantized": "I8", "float-quantized": "F8_E4M3"}[scheme.format]
    return {"weight": TensorSpec(codes, shape), "weight_scale": TensorSpec(dtype, (rows, groups))}


def _layer_count(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """Layers to look at: config.json cannot make us look for more than there are tensors."""
    return min(decoder.num_layers, len(checkpoint.tensors))


def _expected(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model has -> its shape. A tied lm_head may be on disk as well."""
    expected = dict(decoder.outside_tensors())
    if f"{LM_HEAD}.weight" in checkpoint.tensors:
        expected[f"{LM_HEAD}.weight"] = (decoder.vocab_size, decoder.hidden_size)
    layer = decoder.layer_tensors()
    for index in range(_layer_count(checkpoint, decoder)):
        expected |= {f"{decoder.layers_prefix}{index}.{name}": shape for name, shape in layer.items()}
    return expected


def _linears(checkpoint: Checkpoint, decoder: Decoder) -> list[Linear]:
    """Every linear, in forward order, lm_head last whether or not it is tied."""
    linears = []
    for index in range(_layer_count(checkpoint, decoder)):
        prefix = f"{decoder.layers_prefix}{index}."
        for group in decoder.family.groups:
            first = prefix + group.linears[0].name
            linears += [
                Linear(prefix + spec.name, decoder.shape(spec), index, first) for spec in group.linears
            ]
    linears.append(Linear(LM_HEAD, (decoder.vocab_size, decoder.hidden_size), None, LM_HEAD))
    return linears


def _leaf_modules(expected: dict[str, tuple[int, ...]]) -> list[str]:
    return list(dict.fromkeys([*(key.rpartition(".")[0] for key in expected), LM_HEAD]))


def _module_plans(checkpoint: Checkpoint, decoder: Decoder, treatment: Treatment) -> list[ModulePlan]:
    plans = []
    for linear, treated in treatment.modules:
        key = f"{linear.name}.weight"
        info = checkpoint.tensors.get(key) or checkpoint.tensors[decoder.embedding]  # lm_head may be tied
        plans.append(
            ModulePlan(
                name=linear.name,
                key=key,
                shape=linear.shape,
                dtype=info.dtype,
                scheme=treated.scheme,
                step=treated.step,
                pruning=treated.pruning,
                layer=linear.layer,
                group=linear.group,
                reason=treated.reason,
            )
        )
    return plans


def _shards(
    checkpoint: Checkpoint,
    decoder: Decoder,
    modules: Sequence[ModulePlan],
    unknown: Sequence[str],
    smooths: bool,
) -> tuple[tuple[LayerPlan, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """A file for each layer, numbered from the first; then files of at most 5 GB for all the rest."""
    outside = [key for key in (*decoder.outside_tensors(), *unknown) if key in checkpoint.tensors]
    if decoder.tied and f"{LM_HEAD}.weight" in checkpoint.tensors:
        outside.append(f"{LM_HEAD}.weight")
    parts = list(_parts(checkpoint, outside))
    total = decoder.num_layers + len(parts)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    by_layer: dict[int | None, list[ModulePlan]] = {}
    for module in modules:
        if module.compressed:
            by_layer.setdefault(module.layer, []).append(module)
    layers = []
    for index in range(decoder.num_layers):
        prefix = f"{decoder.layers_prefix}{index}."
        compressed = tuple(by_layer.get(index, ()))
        folds = _folds(decoder, prefix, compressed) if smooths else {}
        keys = {module.key for module in compressed} | {key for fold in folds.values() for key in fold.keys}
        copied = tuple(prefix + name for name in decoder.layer_tensors() if prefix + name not in keys)
        layers.append(LayerPlan(index, prefix, compressed, copied, names[index], folds))
    return tuple(layers), tuple(zip(names[decoder.num_layers :], parts, strict=True))


def _folds(decoder: Decoder, prefix: str, compressed: Sequence[ModulePlan]) -> dict[str, FoldPlan]:
    """The norms of a layer all of whose readers are compressed, by group."""
    names = {module.name for module in compressed}
    folds = {}
    for group in decoder.family.groups:
        if group.norm and all(prefix + linear.name in names for linear in group.linears):
            first, norm = prefix + group.linears[0].name, prefix + group.norm
            keys = tuple(
                f"{norm}.{suffix}"
                for suffix in ("weight", "bias")
                if f"{group.norm}.{suffix}" in decoder.layer_tensors()
            )
            folds[first] = FoldPlan(first, norm, keys, decoder.family.norm_offset)
    return folds


def _parts(checkpoint: Checkpoint, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    part: list[str] = []
    size = 0
    for key in keys:
        nbytes = checkpoint.tensors[key].nbytes
        if part and size + nbytes > MAX_OUTSIDE_SHARD_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(key)
        size += nbytes
    yield tuple(part)


def _stored_layer(checkpoint: Checkpoint, layer: LayerPlan) -> dict[str, TensorSpec]:
    specs = {key: checkpoint.tensors[key].spec for key in layer.unquantized}
    for module in layer.modules:
        tensors = stored_tensors(module.scheme, module.shape, module.dtype)
        specs |= {f"{module.name}.{suffix}": spec for suffix, spec in tensors.items()}
    return specs


def _workload(
    checkpoint: Checkpoint,
    decoder: Decoder,
    layers: Sequence[LayerPlan],
    compressed: Sequence[ModulePlan],
    parked: ParkedTokens | None,
    calibrates: bool,
    spills: bool,
) -> Workload:
    """The sizes that decide the peak memory."""
    tensors = checkpoint.tensors
    group_elements: Counter[str] = Counter()
    for module in compressed:
        group_elements[module.group] += math.prod(module.shape)
    names = decoder.layer_tensors()
    return Workload(
        itemsize=COMPUTE_ITEMSIZE,
        outside_bytes=sum(tensors[key].nbytes for key in decoder.outside_tensors()),
        layer_bytes=max(sum(tensors[layer.prefix + name].nbytes for name in names) for layer in layers),
        layer_output_bytes=max(
            sum(spec.nbytes for spec in _stored_layer(checkpoint, layer).values()) for layer in layers
        ),
        group_elements=max(group_elements.values()),
        group_columns=max(module.shape[1] for module in compressed),
        parked_width=decoder.parked_width,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        parked=parked,
        spills=spills,
        solves_gram=calibrates,
    )


def _copied_bytes(checkpoint: Checkpoint) -> int:
    return sum((checkpoint.folder / name).stat().st_size for name in checkpoint.other_files)
