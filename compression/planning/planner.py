"""Recipe x checkpoint headers -> Plan: what becomes of every tensor, decided before any compute.

Imports neither torch nor transformers, reads no tensor data, and takes milliseconds: the control plane
plans at submission. What cannot succeed is refused here, with every reason at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from compression.architectures.decoder import LM_HEAD, Decoder, read_decoder
from compression.architectures.naming import module_names, on_disk, with_model_names
from compression.architectures.stacks import unstacked
from compression.checkpoint.block_fp8 import dequantized
from compression.checkpoint.headers import Checkpoint, read_checkpoint
from compression.checkpoint.layout import file_size
from compression.errors import PlanError, Problem, SourceError
from compression.estimates.disk import disk_estimate
from compression.estimates.duration import duration
from compression.estimates.guide import GuideModel, guide_estimate
from compression.estimates.memory import ACTIVATION_BUDGET_BYTES, ParkedTokens
from compression.planning import checks
from compression.planning.plans import ModulePlan, Plan
from compression.planning.served import NOT_SERVED, reordered
from compression.planning.shards import assign_shards, attention_linear, stored_layer
from compression.planning.treatment import Linear, Treatment, treat
from compression.planning.workload import make_workload
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.sources import headers_of


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
    read: Callable[[Path], Checkpoint] = read_checkpoint,
) -> Plan:
    """Decide everything that config.json and the safetensors headers allow to decide.

    source: a folder, or a model on the Hub or in S3, of which only headers are fetched. name: what the model
    is called; by default as its folder, or as on the Hub. require "vllm": what its kernels do not take is a
    problem, otherwise a warning. read: reads a folder's headers; who plans many jobs reads each folder once.

    Raises:
        PlanError: the job cannot succeed; `problems` has every reason that was found. What is wrong with the
            checkpoint has the codes of `read_checkpoint` and `dequantized`; elsewhere, of `headers_of` too.
    """
    has_data = dataset is not None
    recipe = checks.with_observers(recipe, has_data)
    problems = checks.recipe_problems(recipe, has_data) + checks.dataset_problems(dataset)
    try:
        folder, own_name = headers_of(source)
        checkpoint = dequantized(read(folder))
    except SourceError as error:
        raise PlanError(Problem(error.code, error.message, error.hint, "/model"), *problems) from error
    warnings: list[Problem] = []
    problems = checks.source_problems(checkpoint, warnings) + problems
    decoder = read_decoder(checkpoint.config)
    if not isinstance(decoder, Decoder):
        raise PlanError(*problems, *decoder)
    vision = decoder.family.vision
    checkpoint = with_model_names(checkpoint, vision)
    tower = tuple(sorted(name for name in checkpoint.tensors if name.startswith(vision.modules)))
    expected = _expected(checkpoint, decoder)
    if not any(problem.code == "source_already_quantized" for problem in problems):
        problems += checks.tensor_problems(checkpoint, decoder, expected)
    linears = _linears(checkpoint, decoder)
    names = [*_leaf_modules(expected, linears), *module_names(checkpoint, tower)]
    treatment = treat(linears, names, recipe)
    problems += treatment.problems
    treated = ((linear.name, t.step, t.scheme) for linear, t in treatment.modules)
    treatment.warnings += reordered(decoder.family.architecture, treated)
    if require == "vllm":
        problems += [warning for warning in treatment.warnings if warning.code == NOT_SERVED]
    problems += checks.smoothing_problems(recipe, decoder)
    problems += checks.cache_problems(recipe, decoder, attention_linear(decoder))
    calibrates = has_data and recipe.needs_data
    if problems:
        raise PlanError(*problems)

    unknown = tuple(sorted(checkpoint.tensors.keys() - expected.keys() - set(tower)))
    checkpoint = unstacked(checkpoint, decoder)
    modules = _module_plans(checkpoint, decoder, treatment)
    caches = recipe.kv_cache_step is not None
    layers, outside = assign_shards(
        checkpoint, decoder, modules, (*tower, *unknown), recipe.smoothing, caches=caches
    )
    stored = [stored_layer(checkpoint, layer) for layer in layers]
    rest = [{key: info.spec for key, info in on_disk(checkpoint, keys).items()} for _, keys in outside]
    output_bytes = sum(map(file_size, [*stored, *rest]))
    compressed = [module for module in modules if module.compressed]
    kept = tuple(module for module in modules if not module.compressed)
    parked = ParkedTokens.of(calibration, evaluation, calibrates=calibrates)
    running = parked if has_data and parked.total else None
    generates = dataset is not None and dataset.generated is True
    work = make_workload(
        checkpoint, decoder, layers, stored, recipe, running, activation_budget_bytes, generates=generates
    )
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
        tower=tower,
        unknown=unknown,
        kept=kept,
        ignore=_ignored(checkpoint, decoder, modules, tower, unknown),
        warnings=(
            *warnings,
            *treatment.warnings,
            *checks.fp8_warnings(checkpoint),
            *checks.dense_warnings(recipe),
            *checks.router_warnings(recipe, decoder),
            *checks.spill_warnings(work.held_bytes, activation_budget_bytes, work.spill_bytes),
            *checks.generation_warnings(work),
            *checks.unknown_warnings(unknown),
        ),
        workload=work,
        guide=guide_estimate(_guide_model(checkpoint, decoder), recipe, calibration),
        disk=disk_estimate(
            output_bytes=output_bytes,
            copied_bytes=_copied_bytes(checkpoint),
            copied_files=len(checkpoint.other_files),
            linears=work.linears,
            spill_bytes=work.spill_bytes,
        ),
        duration=duration(decoder, recipe, work, moved_bytes=checkpoint.weight_bytes + 2 * output_bytes),
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
        shape = decoder.layer(count)
        tensors += decoder.sizes["experts"] if decoder.is_sparse(count) and not shape.stacks else 1
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


def _leaf_modules(expected: dict[str, tuple[int, ...]], linears: Sequence[Linear]) -> list[str]:
    names = (key.rpartition(".")[0] for key in expected if key.endswith((".weight", ".bias")))
    return list(dict.fromkeys([*names, *(linear.name for linear in linears)]))


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
    checkpoint: Checkpoint,
    decoder: Decoder,
    modules: Sequence[ModulePlan],
    tower: Sequence[str],
    unknown: Sequence[str],
) -> tuple[str, ...]:
    """What readers find as it was: linears without a scheme; routers, which some readers make linears; the
    tower's; and weights of layers after the last, which predict further tokens and which some readers run."""

    def matrix(key: str) -> bool:
        return key.endswith(".weight") and len(checkpoint.tensors[key].shape) == 2

    names = []
    for layer, members in groupby(modules, lambda module: module.layer):
        names += [module.name for module in members if module.scheme is None]
        if layer is not None:
            names += [f"{decoder.layers_prefix}{layer}.{router}" for router in decoder.layer(layer).routers]
    for key in filter(matrix, unknown):
        name = key.removesuffix(".weight")
        number = name.removeprefix(decoder.layers_prefix).partition(".")[0]
        if number.isdecimal() and len(number) < 10 and int(number) >= decoder.num_layers:
            names.append(name)
    return (*names, *module_names(checkpoint, filter(matrix, tower)))


def _guide_model(checkpoint: Checkpoint, decoder: Decoder) -> GuideModel:
    return GuideModel.of(
        checkpoint.tensors,
        layers_prefix=decoder.layers_prefix,
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
    )


def _copied_bytes(checkpoint: Checkpoint) -> int:
    return sum((checkpoint.folder / name).stat().st_size for name in checkpoint.other_files)
