"""The one loop over layers: a compression run from top to bottom.

plan ─▶ empty model ─▶ for each decoder layer:
                          load it ─▶ original batches pass ─▶ for each group of linears that share an input:
                                                         Gram of what they really see ─▶ smooth it ─▶ solve
                          compressed batches pass ─▶ write its shard ─▶ journal ─▶ drop it
     ─▶ compare the two models ─▶ copy the rest ─▶ read everything back ─▶ publish by one rename
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compression.boundary import last_resort
from compression.checkpoint.formats import decode, encode
from compression.checkpoint.headers import read_header
from compression.checkpoint.reader import TORCH_DTYPES, read_infos
from compression.checkpoint.tensors import StoredTensor
from compression.checkpoint.writer import Shard, write_shard
from compression.data.calibration import load_blocks
from compression.data.documents import dataset_digest
from compression.data.sources import Sources, fetch, local
from compression.events import (
    GenerationProgress,
    LayerReplayed,
    LayerSolved,
    OnEvent,
    PhaseChanged,
    PlanResolved,
    Teller,
    WarningRaised,
)
from compression.families.naming import on_disk
from compression.machine import arithmetic as machine
from compression.machine import host_memory
from compression.machine.arithmetic import DTYPES, Arithmetic
from compression.machine.clock import Clock
from compression.math.errors import errors_of
from compression.math.finite import (
    named,
    require_finite_input_scale,
    require_finite_result,
    require_finite_weight,
)
from compression.math.gram import Gram, require_finite_gram
from compression.math.grid import QuantizedWeight, Rounded, fixed_input_scale
from compression.math.prune import Pruned
from compression.math.search import observer_of
from compression.methods import method_of
from compression.model.activations import Activations
from compression.model.fold import fold, fold_linears
from compression.model.generate import written_by_model
from compression.model.streamed import StreamedModel
from compression.planning.memory import ACTIVATION_BUDGET_BYTES
from compression.planning.planner import plan as make_plan
from compression.planning.plans import LayerPlan, ModulePlan, Plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.report import ModuleReport, Report, dampening_warnings
from compression.run.fingerprint import resolve, source_digests
from compression.run.journal import FinishedLayer, Journal, check_output
from compression.run.publish import publish
from compression.run.results import make_report
from compression.run.verify import check_against_model, check_files, sha256_of


@last_resort
@torch.no_grad()
def compress(
    source: str | Path,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    dataset: DatasetSpec | None = None,
    calibration: Calibration = Calibration(),
    evaluation: Evaluation = Evaluation(),
    device: str = "auto",
    activation_budget_bytes: int = ACTIVATION_BUDGET_BYTES,
    on_event: OnEvent | None = None,
    self_check: bool = True,
) -> Report:
    """Compress the checkpoint in folder `source` into `output_dir`, which must not exist yet.

    `source` may also be the name of a model on the Hub, `owner/name` or `owner/name@revision`, or a folder in
    S3, `s3://bucket/folder` or `s3://bucket/folder@revision`; it is planned from its headers, and downloaded
    if it can be compressed. The text comes from there as `dataset` says.

    A run that was interrupted is taken up at its first unfinished layer when it is called again with the same
    arguments. `activation_budget_bytes` bounds what batches hold in memory between layers: above it they lie
    in a scratch file beside the output. `on_event` hears of every phase and layer. `self_check` reads every
    written module back before the result is published.

    Raises:
        CompressionError: with a stable code; what is published is whole or not there.
    """
    emit = on_event or (lambda _event: None)
    device = machine.resolve_device(device)
    clock = Clock(device)
    planned = partial(
        make_plan,
        recipe=recipe,
        calibration=calibration,
        evaluation=evaluation,
        activation_budget_bytes=activation_budget_bytes,
    )
    sources = local(source, dataset)
    if sources is None:
        check_output(Path(output_dir))
        emit(PhaseChanged("fetch"))
        with clock.phase("fetch"):
            planned(
                source, dataset=dataset
            )  # what cannot succeed is refused before anything large is fetched
            sources = fetch(source, dataset, calibration, evaluation, emit)
    dataset = sources.dataset
    emit(PhaseChanged("plan"))
    with clock.phase("plan"):
        plan = planned(sources.folder, name=sources.name, dataset=dataset)
        for warning in plan.warnings:
            emit(WarningRaised(warning.code, warning.message))
        journal = Journal.open(Path(output_dir))
        arithmetic = _begin(plan, sources, device, journal, emit)
        model = _model(plan, arithmetic, device)
        check_against_model(plan, model)
    if dataset is not None and dataset.generated:
        emit(PhaseChanged("generate"))
        with clock.phase("generate"):
            told = Teller(emit, GenerationProgress)
            dataset = written_by_model(plan, _model(plan, arithmetic, device), journal.scratch, told)
    with clock.phase("plan"):
        blocks = None
        if dataset is not None:
            blocks = load_blocks(dataset, plan.source, calibration, evaluation, calibrate=plan.calibrates)
            for warning in blocks.warnings:
                emit(WarningRaised(warning.code, warning.message))

    emit(PhaseChanged("compress"))
    rows: list[ModuleReport] = []
    shards: list[Shard] = []
    with closing(Activations(plan, model, blocks, arithmetic, journal.scratch, clock)) as activations:
        for layer in plan.layers:
            before = clock.total
            with clock.phase("read"):
                model.load_layer(layer.index)
            activations.pass_original(layer.index)
            finished = journal.finished.get(layer.index)
            if finished:
                with clock.phase("read"):
                    shard = journal.shards[layer.index]
                    stored = layer.in_model(read_infos(read_header(journal.folder / shard.file).values()))
                    model.set_weights(_decode(layer.modules, stored))
                    model.set_parameters({key: stored[key] for key in layer.folded})
                activations.pass_calibration(layer)
                emit(LayerReplayed(layer.index, len(plan.layers), clock.total - before))
            else:
                stored, modules = _solve_layer(layer, plan, model, activations, clock)
                stored.update(activations.pass_calibration(layer))
                with clock.phase("write"):
                    copied = {key: plan.checkpoint.tensors[key] for key in layer.copied}
                    tensors: dict[str, Tensor | StoredTensor] = {**stored, **copied}
                    shard = write_shard(journal.folder / layer.shard, layer.on_disk(tensors))
                    finished = journal.commit(layer.index, shard, modules)
                for raised in dampening_warnings(modules):
                    emit(WarningRaised(**raised))
                emit(_layer_solved(finished, len(plan.layers), clock.total - before))
            activations.pass_compressed(layer, stored)
            model.drop_layer(layer.index)
            rows.extend(finished.modules)
            shards.append(shard)
        measured = activations.compare()

    emit(PhaseChanged("verify"))
    with clock.phase("write"):
        for file, keys in plan.outside:
            shards.append(write_shard(journal.folder / file, on_disk(plan.checkpoint, keys)))
    if self_check:
        with clock.phase("verify"):
            check_files(plan, journal.folder, rows)
    report = make_report(plan, journal, shards, rows, measured, blocks, clock, device)
    publish(plan, journal, shards, report, Path(output_dir))
    return report


def _begin(plan: Plan, sources: Sources, device: str, journal: Journal, emit: OnEvent) -> Arithmetic:
    """Resolve the plan, or obey the one that an interrupted run of the same work resolved.

    device: "cpu" or "cuda:N", what this run computes on; an earlier one may have used another card.
    """
    digests = source_digests(plan)
    data = None if sources.dataset is None else dataset_digest(sources.dataset)
    here = machine.choose(device, _stored_dtype(plan))
    header = resolve(plan, digests, data, here)
    if sources.origins:
        header["origins"] = sources.origins
    if journal.header and journal.header["work_key"] != header["work_key"]:
        emit(WarningRaised("started_over", "The interrupted run here was of other work; it is begun anew."))
    elif journal.header:
        earlier = Arithmetic.from_dict(journal.header["resolved"]["arithmetic"])
        if earlier.obeyable(here):
            here, header = earlier, journal.header
        else:
            header["bytes_may_differ"] = True
            emit(WarningRaised("bytes_may_differ", "This machine cannot compute as the interrupted run did."))
    journal.begin(header)
    machine.apply(here, device)
    host_memory.map_large_blocks()
    emit(PlanResolved(header))
    return here


def _model(plan: Plan, arithmetic: Arithmetic, device: str) -> StreamedModel:
    return StreamedModel(
        plan.checkpoint,
        plan.layers_prefix,
        device=device,
        compute_dtype=DTYPES[arithmetic.compute_dtype],
    )


def _stored_dtype(plan: Plan) -> str:
    return next(module.dtype for layer in plan.layers for module in layer.modules)


def _solve_layer(
    layer: LayerPlan,
    plan: Plan,
    model: StreamedModel,
    activations: Activations,
    clock: Clock,
) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    """Solve every group of one real layer, in the order in which the layer runs them.

    Each linear's weight is replaced by what a reader of the checkpoint gets, before the batches go on through
    it. Returns the tensors to write, by their names on disk, and the report rows.
    """
    stored: dict[str, Tensor] = {}
    rows: list[ModuleReport] = []
    with clock.phase("solve"):
        folds = fold_linears(layer, model, activations, plan.recipe)
        stored.update(folds.biases)
    for group in activations.groups(layer):
        names = [module.name for module in group.modules]
        weights = [folds.weights.pop(n, w) for n, w in zip(names, model.weights(names), strict=True)]
        smoothed = group.name in folds.groups
        with clock.phase("gram"):
            gram = group.gram()
            if gram is not None:
                require_finite_gram(group.name, gram)
        with clock.phase("solve"):
            if planned := layer.folds.get(group.name):
                assert gram is not None
                folded = fold(planned, group, weights, gram, model, activations, plan.recipe)
                stored.update(folded.norm)
                weights, gram, smoothed = folded.weights, folded.gram, smoothed or folded.done
            largest = group.largest_input()
            for stack in stacks(group.modules, weights, plan.recipe):
                for solved in solve(stack, gram, plan.recipe, largest_input=largest):
                    tensors = encode(
                        solved.module.name, solved.weight, solved.module.scheme, solved.fixed_input
                    )
                    model.set_weights(_decode([solved.module], tensors))
                    stored.update(tensors)
                    rows.append(replace(solved.report, smoothed=smoothed))
                    host_memory.give_back()
    return stored, rows


Stack = Sequence[tuple[ModulePlan, Tensor]]
"""Linears [out_i, in] that read the same tensor and become the same: solved as one matrix, along out."""


def stacks(modules: Sequence[ModulePlan], weights: Sequence[Tensor], recipe: Recipe) -> Iterable[Stack]:
    """What of a group of linears is solved together."""
    alike: dict[tuple[int | None, int | None, str, str], list[tuple[ModulePlan, Tensor]]] = {}
    for module, weight in zip(modules, weights, strict=True):
        key = (module.pruning, module.step, module.dtype, module.solved_with(recipe))
        alike.setdefault(key, []).append((module, weight))
    return alike.values()


@dataclass(frozen=True)
class Solved:
    """A linear's new weight, a tensor in its stored dtype where no scheme applies, with its report's row.

    fixed_input: [1], how its activations are quantized, where that is fixed before run time.
    """

    module: ModulePlan
    weight: QuantizedWeight | Tensor
    report: ModuleReport
    fixed_input: Tensor | None


def solve(
    stack: Stack, gram: Gram | None, recipe: Recipe, *, largest_input: Tensor | None = None
) -> Iterator[Solved]:
    """Prune, find scales, round, and measure what that did: rows are independent, and the Gram is shared.

    stack: weights [out_i, in] in any float dtype. gram, largest_input: statistics of their input and its
    largest magnitude, None without data.

    Raises:
        NumericalError: `non_finite_weights`, `non_finite_activations`, `singular_gram`,
            `weights_out_of_range`; the message names the linears.
    """
    first, names = stack[0][0], [module.name for module, _ in stack]
    pruning = None if first.pruning is None else recipe.pruning[first.pruning]
    step = None if first.step is None else recipe.quantizing[first.step]
    scheme, stored_dtype = first.scheme, TORCH_DTYPES[first.dtype]
    fixed_input = None
    if scheme is not None and scheme.fixed_input is not None:
        assert scheme.input_activations is not None
        assert largest_input is not None  # the plan refuses these schemes without a dataset
        fixed_input = fixed_input_scale(largest_input, scheme.input_activations, stored_dtype)
        require_finite_input_scale(first.group, fixed_input)
    for module, weight in stack:
        require_finite_weight(module.name, weight)
    sizes = [len(weight) for _, weight in stack]
    original = _stacked([weight for _, weight in stack])
    matrix = None if gram is None else gram.matrix
    pruned = Pruned(original, None)
    rounded: Rounded | None = None
    with named(names):
        if pruning is not None:
            pruned = method_of(pruning).solve(original, matrix, splits=sizes, **pruning.options)
        if step is not None and scheme is not None:
            find_scales = observer_of(step.observer, gram)
            params = find_scales(pruned.weight, scheme.weights, stored_dtype)
            rounded = method_of(step).solve(
                pruned.weight, matrix, scheme.weights, params, keep=pruned.keep, **step.options
            )
    dampening_asked, dampening_frac = None, None
    for done, by in ((pruned, pruning), (rounded, step)):
        if by is not None and done is not None and done.dampening_frac is not None:
            dampening_asked, dampening_frac = by.options.get("dampening_frac"), done.dampening_frac
    stop = 0
    for (module, _), size in zip(stack, sizes, strict=True):
        start, stop = stop, stop + size
        solution: QuantizedWeight | Tensor
        if rounded is None:
            solution = meant = pruned.weight[start:stop].to(stored_dtype)
        else:
            part = rounded.weight.rows(start, stop)
            solution, meant = part, part.dequantize(stored_dtype)
        require_finite_result(module.name, meant)
        weight_error, relative_error = errors_of(original[start:stop], meant, matrix)
        report = ModuleReport(
            name=module.name,
            method="+".join(done.type for done in (pruning, step) if done is not None),
            scheme=None if scheme is None else scheme.name,
            group_size=None if scheme is None else scheme.weights.group_size,
            shape=(size, original.shape[1]),
            weight_error=weight_error,
            relative_error=relative_error,
            dampening_frac=dampening_frac,
            dampening_asked=dampening_asked,
            dead_columns=0 if rounded is None else rounded.dead_columns,
            sparsity=None if pruning is None else float((meant == 0).float().mean()),
            dequantized_sha256=sha256_of(meant),
            tokens=gram.tokens - gram.borrowed if gram is not None and module.experts else None,
        )
        yield Solved(module, solution, report, fixed_input)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights along out, in float32; a float32 weight alone is not copied."""
    if len(weights) == 1:
        return weights[0].float()
    shape = (sum(map(len, weights)), weights[0].shape[1])
    return torch.cat([*weights], out=weights[0].new_empty(shape, dtype=torch.float32))


def _decode(modules: Iterable[ModulePlan], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a reader gets from tensors on disk: the model goes on with these in any case."""
    return {m.name: decode(m.name, tensors, m.scheme, TORCH_DTYPES[m.dtype]) for m in modules}


def _layer_solved(finished: FinishedLayer, layers_total: int, seconds: float) -> LayerSolved:
    errors = [row.relative_error for row in finished.modules if row.relative_error is not None]
    return LayerSolved(
        layer=finished.layer,
        layers_total=layers_total,
        relative_error=sum(errors) / len(errors) if errors else None,
        seconds=seconds,
        eta_seconds=seconds * (layers_total - finished.layer - 1),
        entry=finished.to_dict(),
    )
