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

from compression.boundary import last_resort
from compression.checkpoint.layout import file_size
from compression.checkpoint.stated import stated_dtype
from compression.data.sources import headers_of
from compression.errors import PlanError, Problem, SourceError
from compression.families.naming import module_names, on_disk
from compression.planning import checks, model_checks
from compression.planning.assignment import Assignments, assign_steps
from compression.planning.cost import disk_estimate, duration
from compression.planning.guide import guide_estimate
from compression.planning.loaded import NOT_LOADED, unloaded
from compression.planning.memory import ACTIVATION_BUDGET_BYTES, ParkedTokens
from compression.planning.plans import ModulePlan, Plan
from compression.planning.served import NOT_SERVED, reordered
from compression.planning.shards import assign_shards, attention_linear, stored_layer
from compression.planning.survey import Survey, survey
from compression.planning.workload import make_workload
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe

Require = Literal["vllm", "transformers", "both"]
"""Readers that must be able to load the result."""

_REQUIRED: dict[Require | None, tuple[str, ...]] = {
    None: (),
    "vllm": (NOT_SERVED,),
    "transformers": (NOT_LOADED,),
    "both": (NOT_SERVED, NOT_LOADED),
}


@last_resort
def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    name: str | None = None,
    dataset: DatasetSpec | None = None,
    calibration: Calibration = Calibration(),
    evaluation: Evaluation = Evaluation(),
    activation_budget_bytes: int = ACTIVATION_BUDGET_BYTES,
    require: Require | None = None,
    look: Callable[[Path], Survey] = survey,
) -> Plan:
    """Decide everything that config.json and the safetensors headers allow to decide.

    source: a folder, or a model on the Hub or in S3, of which only headers are fetched. name: what the model
    is called; by default as its folder, or as on the Hub. require: readers that must load the result: what
    they do not take is a problem, otherwise a warning. look: surveys a folder; who plans many jobs surveys
    each folder once.

    Raises:
        PlanError: the job cannot succeed; `problems` has every reason that was found. What is wrong with the
            checkpoint has the codes of `survey`; elsewhere, of `headers_of` too.
    """
    has_data = dataset is not None
    recipe = checks.with_observers(recipe, has_data)
    problems = checks.recipe_problems(recipe, has_data) + checks.dataset_problems(dataset)
    try:
        folder, own_name = headers_of(source)
        model = look(folder)
    except SourceError as error:
        raise PlanError(Problem(error.code, error.message, error.hint, "/model"), *problems) from error
    except PlanError as error:
        raise PlanError(*problems, *error.problems) from error
    checkpoint, decoder = model.checkpoint, model.decoder
    assigned = assign_steps(model.linears, model.modules, recipe)
    quantized = ((linear.name, t.step, t.scheme) for linear, t in assigned.modules)
    assigned.warnings += reordered(decoder.family.architecture, quantized)
    assigned.warnings += unloaded(decoder.family.architecture, assigned.modules)
    problems += [*model.problems, *assigned.problems]
    problems += [warning for warning in assigned.warnings if warning.code in _REQUIRED[require]]
    problems += checks.smoothing_problems(recipe, decoder)
    problems += checks.cache_problems(recipe, decoder, attention_linear(decoder))
    calibrates = has_data and recipe.needs_data
    parked = ParkedTokens.of(calibration, evaluation, calibrates=calibrates)
    runs = has_data and bool(parked.total)
    problems += model_checks.position_problems(decoder, calibration) if runs else []
    if problems:
        raise PlanError(*problems)

    modules = _module_plans(model, assigned)
    caches = recipe.kv_cache_step is not None
    layers, outside = assign_shards(
        checkpoint, decoder, modules, (*model.tower, *model.unknown), recipe.smoothing, caches=caches
    )
    stored = [stored_layer(checkpoint, layer) for layer in layers]
    rest = [{key: info.spec for key, info in on_disk(checkpoint, keys).items()} for _, keys in outside]
    output_bytes = sum(map(file_size, [*stored, *rest]))
    running = parked if runs else None
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
        tower=model.tower,
        unknown=model.unknown,
        kept=tuple(module for module in modules if not module.compressed),
        ignore=_ignored(model, modules),
        warnings=(
            *model.warnings,
            *assigned.warnings,
            *checks.dense_warnings(recipe),
            *checks.router_warnings(recipe, decoder),
            *checks.spill_warnings(work.held_bytes, activation_budget_bytes, work.spill_bytes),
            *checks.generation_warnings(work),
            *(model_checks.position_warnings(decoder, calibration) if runs else ()),
            *checks.unknown_warnings(model.unknown),
            *checks.dtype_warnings(
                stated_dtype(checkpoint.config),
                {module.dtype for module in modules if module.scheme},
                (module.scheme for module in modules if module.scheme),
            ),
        ),
        workload=work,
        guide=guide_estimate(model.guide, recipe, calibration),
        disk=disk_estimate(
            output_bytes=output_bytes,
            copied_bytes=model.copied_bytes,
            copied_files=len(checkpoint.other_files),
            linears=work.linears,
            spill_bytes=work.spill_bytes,
        ),
        duration=duration(decoder, recipe, work, moved_bytes=checkpoint.weight_bytes + 2 * output_bytes),
        source_bytes=checkpoint.weight_bytes,
        output_bytes=output_bytes,
        parameters=model.parameters,
        compressed_parameters=sum(math.prod(module.shape) for module in modules if module.compressed),
        calibrates=calibrates,
    )


def _module_plans(model: Survey, assigned: Assignments) -> list[ModulePlan]:
    tensors = model.checkpoint.tensors
    plans = []
    for linear, assignment in assigned.modules:
        key = f"{linear.name}.weight"
        info = tensors.get(key) or tensors[model.decoder.embedding]  # lm_head may be tied
        plans.append(
            ModulePlan(
                name=linear.name,
                key=key,
                shape=linear.shape,
                dtype=info.dtype,
                scheme=assignment.scheme,
                step=assignment.step,
                pruning=assignment.pruning,
                layer=linear.layer,
                group=linear.group,
                experts=linear.experts,
                reason=assignment.reason,
            )
        )
    return plans


def _ignored(model: Survey, modules: Sequence[ModulePlan]) -> tuple[str, ...]:
    """What readers find as it was: linears without a scheme; routers, which some readers make linears; the
    tower's; and weights of layers after the last, which predict further tokens and which some readers run."""

    checkpoint, decoder = model.checkpoint, model.decoder

    def matrix(key: str) -> bool:
        return key.endswith(".weight") and len(checkpoint.tensors[key].shape) == 2

    names = []
    for layer, members in groupby(modules, lambda module: module.layer):
        names += [module.name for module in members if module.scheme is None]
        if layer is not None:
            names += [f"{decoder.layers_prefix}{layer}.{router}" for router in decoder.layer(layer).routers]
    for key in filter(matrix, model.unknown):
        name = key.removesuffix(".weight")
        number = name.removeprefix(decoder.layers_prefix).partition(".")[0]
        if number.isdecimal() and len(number) < 10 and int(number) >= decoder.num_layers:
            names.append(name)
    return (*names, *module_names(checkpoint, filter(matrix, model.tower)))
