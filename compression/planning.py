"""Recipe x checkpoint headers -> Plan: what becomes of every tensor, decided before any compute.

Imports neither torch nor transformers, reads no tensor data, and takes milliseconds: the control plane
plans at submission. What cannot succeed is refused here, with every reason at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from compression import checks, memory
from compression.checkpoint.headers import Checkpoint, read_checkpoint
from compression.checkpoint.layout import file_size
from compression.decoder import LM_HEAD, Decoder, read_decoder
from compression.errors import PlanError, Problem, SourceError
from compression.memory import (
    ACTIVATION_BUDGET_BYTES,
    COMPUTE_ITEMSIZE,
    ParkedTokens,
    Workload,
    activation_bytes,
    estimate,
)
from compression.plans import LayerPlan, ModulePlan, Plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.served import NOT_SERVED
from compression.shards import assign_shards, attention_linear, stored_layer
from compression.sources import headers_of
from compression.treatment import Linear, Treatment, treat

METADATA_BYTES = 1 << 20
"""Allowance on disk for config, index, card, recipe and report."""


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    name: str | None = None,
    dataset: DatasetSpec | None = None,
    calibration: Calibration = Calibration(),
    evaluation: Evaluation = Evaluation(),
    activation_budget_bytes: int = ACTIVATION_BUDGET_BYTES,
    require: Literal["vllm"] | None = None,
) -> Plan:
    """Decide everything that config.json and the safetensors headers allow to decide.

    source: a folder, or a model's name on the Hub, of which only headers are fetched. name: what the model is
    called; by default as its folder, or as on the Hub. require "vllm": what its kernels do not take is a
    problem, otherwise a warning.

    Raises:
        PlanError: the job cannot succeed; `problems` has every reason that was found. What is wrong with the
            checkpoint's files has the codes of `read_checkpoint`; what the Hub refuses, those of `HubClient`.
    """
    has_data = dataset is not None
    recipe = checks.with_observers(recipe, has_data)
    problems = checks.recipe_problems(recipe, has_data) + checks.dataset_problems(dataset)
    try:
        folder, own_name = headers_of(source)
        checkpoint = read_checkpoint(folder)
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
    if require == "vllm":
        problems += [warning for warning in treatment.warnings if warning.code == NOT_SERVED]
    problems += checks.smoothing_problems(recipe, decoder)
    problems += checks.cache_problems(recipe, decoder, attention_linear(decoder))
    calibrates = has_data and recipe.needs_data
    if problems:
        raise PlanError(*problems)

    unknown = tuple(sorted(checkpoint.tensors.keys() - expected.keys()))
    modules = _module_plans(checkpoint, decoder, treatment)
    caches = recipe.kv_cache_step is not None
    layers, outside = assign_shards(checkpoint, decoder, modules, unknown, recipe.smoothing, caches=caches)
    stored = [stored_layer(checkpoint, layer) for layer in layers]
    stored += [{key: checkpoint.tensors[key].spec for key in keys} for _, keys in outside]
    output_bytes = sum(map(file_size, stored))
    compressed = [module for module in modules if module.compressed]
    kept = tuple(module for module in modules if not module.compressed)
    parked = ParkedTokens.of(calibration, evaluation, calibrates=calibrates) if has_data else None
    held = activation_bytes(decoder.parked_width, COMPUTE_ITEMSIZE, parked) if parked else 0
    spill_bytes = 0
    if parked and held > activation_budget_bytes:
        spill_bytes = activation_bytes(decoder.hidden_size, COMPUTE_ITEMSIZE, parked)
    at_once = _experts_at_once(decoder, parked, activation_budget_bytes if spill_bytes else 0)
    return Plan(
        source=folder,
        name=name or own_name,
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
        ignore=_ignored(checkpoint, decoder, modules, unknown),
        warnings=(
            *warnings,
            *treatment.warnings,
            *checks.dense_warnings(recipe),
            *checks.router_warnings(recipe, decoder),
            *checks.spill_warnings(held, activation_budget_bytes, spill_bytes),
            *checks.unknown_warnings(unknown),
        ),
        memory=estimate(
            _workload(checkpoint, decoder, layers, compressed, parked, calibrates, spill_bytes > 0, at_once)
        ),
        experts_at_once=at_once,
        disk_bytes=output_bytes + _copied_bytes(checkpoint) + METADATA_BYTES + spill_bytes,
        spill_bytes=spill_bytes,
        source_bytes=checkpoint.weight_bytes,
        output_bytes=output_bytes,
        parameters=sum(info.spec.elements for info in checkpoint.tensors.values()),
        compressed_parameters=sum(math.prod(module.shape) for module in compressed),
        calibrates=calibrates,
    )


def _layer_count(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """Layers to look at: config.json cannot make us look for more than there are tensors."""
    count = tensors = 0
    while count < decoder.num_layers and tensors < len(checkpoint.tensors):
        tensors += decoder.sizes["experts"] if decoder.is_sparse(count) else 1
        count += 1
    return count


def _expected(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model has -> its shape. A tied lm_head may be on disk as well."""
    expected = dict(decoder.outside_tensors())
    if f"{LM_HEAD}.weight" in checkpoint.tensors:
        expected[f"{LM_HEAD}.weight"] = (decoder.vocab_size, decoder.hidden_size)
    for index in range(_layer_count(checkpoint, decoder)):
        layer = decoder.layer(index).tensors
        expected |= {f"{decoder.layers_prefix}{index}.{name}": shape for name, shape in layer.items()}
    return expected


def _linears(checkpoint: Checkpoint, decoder: Decoder) -> list[Linear]:
    """Every linear, in forward order, lm_head last whether or not it is tied."""
    linears = []
    for index in range(_layer_count(checkpoint, decoder)):
        prefix = f"{decoder.layers_prefix}{index}."
        for group in decoder.layer(index).groups:
            first = prefix + group.linears[0].name
            experts = prefix + group.experts if group.experts else ""
            linears += [
                Linear(prefix + spec.name, decoder.shape(spec), index, first, experts, spec.gate)
                for spec in group.linears
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
                experts=linear.experts,
                reason=treated.reason,
            )
        )
    return plans


def _ignored(
    checkpoint: Checkpoint, decoder: Decoder, modules: Sequence[ModulePlan], unknown: Sequence[str]
) -> tuple[str, ...]:
    """What readers find as it was: linears without a scheme; routers, which some readers make linears; and
    weights of layers after the last, which predict further tokens and which some readers run."""
    names = []
    for layer, members in groupby(modules, lambda module: module.layer):
        names += [module.name for module in members if module.scheme is None]
        if layer is not None:
            names += [f"{decoder.layers_prefix}{layer}.{router}" for router in decoder.layer(layer).routers]
    for key in unknown:
        name, _, leaf = key.rpartition(".")
        number = name.removeprefix(decoder.layers_prefix).partition(".")[0]
        beyond = number.isdecimal() and len(number) < 10 and int(number) >= decoder.num_layers
        if beyond and leaf == "weight" and len(checkpoint.tensors[key].shape) == 2:
            names.append(name)
    return tuple(names)


def _workload(
    checkpoint: Checkpoint,
    decoder: Decoder,
    layers: Sequence[LayerPlan],
    compressed: Sequence[ModulePlan],
    parked: ParkedTokens | None,
    calibrates: bool,
    spills: bool,
    experts_at_once: int,
) -> Workload:
    """The sizes that decide the peak memory."""
    tensors = checkpoint.tensors
    group_elements: Counter[str] = Counter()
    for module in compressed:
        group_elements[module.group] += math.prod(module.shape)
    return Workload(
        itemsize=COMPUTE_ITEMSIZE,
        outside_bytes=sum(tensors[key].nbytes for key in decoder.outside_tensors()),
        layer_bytes=max(
            sum(tensors[layer.prefix + name].nbytes for name in decoder.layer(layer.index).tensors)
            for layer in layers
        ),
        layer_output_bytes=max(
            sum(spec.nbytes for spec in stored_layer(checkpoint, layer).values()) for layer in layers
        ),
        group_elements=max(group_elements.values()),
        group_columns=max(module.shape[1] for module in compressed),
        parked_width=decoder.parked_width,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        parked=parked,
        spills=spills,
        solves_gram=calibrates,
        expert_columns=_expert_columns(decoder),
        experts_at_once=experts_at_once,
    )


def _expert_columns(decoder: Decoder) -> int:
    return max(decoder.hidden_size, decoder.sizes["expert_inner"]) if decoder.family.sparse else 0


def _experts_at_once(decoder: Decoder, parked: ParkedTokens | None, budget_bytes: int) -> int:
    """Gram matrices take what the activations that lie on disk would have had; in memory one is enough."""
    if decoder.family.sparse is None or parked is None:
        return 0
    columns = _expert_columns(decoder)
    return memory.experts_at_once(budget_bytes, columns, parked, decoder.sizes["experts"])


def _copied_bytes(checkpoint: Checkpoint) -> int:
    return sum((checkpoint.folder / name).stat().st_size for name in checkpoint.other_files)
