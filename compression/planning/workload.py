"""What a plan's run has to do, in sizes: what the estimates of memory, disk and time are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import prod

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.layout import TensorSpec
from compression.families.decoder import LM_HEAD, Decoder
from compression.planning.memory import ParkedTokens, Workload
from compression.planning.plans import LayerPlan, ModulePlan
from compression.planning.solver_memory import GroupWork
from compression.recipe import Recipe


def make_workload(
    checkpoint: Checkpoint,
    decoder: Decoder,
    layers: Sequence[LayerPlan],
    stored: Sequence[Mapping[str, TensorSpec]],
    recipe: Recipe,
    parked: ParkedTokens | None,
    activation_budget_bytes: int,
    *,
    generates: bool = False,
) -> Workload:
    """The sizes that decide the peak memory, and whether hidden states go to disk.

    stored: what each of `layers` is on disk, compressed. generates: whether the model writes the text.
    """
    sizes, tensors = decoder.sizes, checkpoint.tensors
    matrices = [tensors[key] for key in (decoder.embedding, f"{LM_HEAD}.weight") if key in tensors]
    largest = max(matrices, key=lambda info: info.nbytes)
    kinds = decoder.kinds()
    widths = {
        group.linears[0].name: decoder.parked_width(group) for shape, _ in kinds for group in shape.groups
    }
    groups: Counter[GroupWork] = Counter()
    for layer in layers:
        groups.update(_groups(layer, widths, recipe))
    experts = sizes["experts"] if decoder.family.sparse else 0
    return Workload(
        matrix_numbers=largest.spec.elements,
        matrix_bytes=largest.nbytes,
        layers_numbers=sum(count * sum(map(prod, shape.tensors.values())) for shape, count in kinds),
        layer_numbers=max(sum(map(prod, shape.tensors.values())) for shape, _ in kinds),
        layer_output_bytes=max(sum(spec.nbytes for spec in specs.values()) for specs in stored),
        groups=groups,
        linears=sum(count * len(group.linears) for shape, count in kinds for group in shape.groups),
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        heads=sizes["heads"],
        rotary_width=2 * sizes["head"],
        window=decoder.window,
        eager=decoder.family.eager,
        parked=parked,
        budget_bytes=activation_budget_bytes,
        expert_columns=max(decoder.hidden_size, sizes["expert_inner"]) if experts else 0,
        experts=experts,
        active_experts=_active_experts(checkpoint, experts),
        generates=generates,
    )


def _active_experts(checkpoint: Checkpoint, experts: int) -> int:
    """Of a token in one layer; all of them where config.json does not say."""
    active = checkpoint.config.get("num_experts_per_tok")
    return active if type(active) is int and 0 < active <= experts else experts


def _groups(layer: LayerPlan, widths: Mapping[str, int], recipe: Recipe) -> Iterator[GroupWork]:
    """A layer's groups in the order in which they are solved. widths: by their first linear, in its layer."""
    folded = _folded(layer)
    for first, members in groupby(layer.modules, lambda module: module.group):
        modules = list(members)
        if first in layer.folds:
            folded |= {module.name: prod(module.shape) for module in modules}
        name, rows = first.removeprefix(layer.prefix), [module.shape[0] for module in modules]
        expert = bool(modules[0].experts)
        yield GroupWork(
            name=_of_any_expert(name, modules[0], layer.prefix) if expert else name,
            rows=sum(rows),
            stacked_rows=max(_stacks(modules, recipe).values()),
            largest_rows=max(rows),
            columns=modules[0].shape[1],
            width=widths[name],
            methods=tuple(
                recipe.steps[index].type
                for index in (modules[0].pruning, modules[0].step)
                if index is not None
            ),
            folded=sum(folded.values()),
            expert=expert,
            fp4=any(module.scheme is not None and module.scheme.weights.is_fp4 for module in modules),
        )
        for module in modules:
            folded.pop(module.name, None)


def _stacks(modules: Sequence[ModulePlan], recipe: Recipe) -> dict[str, int]:
    """Rows of what is solved as one stacked matrix, by what its linears have in common."""
    stacks: Counter[str] = Counter()
    for module in modules:
        stacks[module.solved_with(recipe)] += module.shape[0]
    return stacks


def _of_any_expert(name: str, module: ModulePlan, prefix: str) -> str:
    """An expert's linear in its layer, with a star for the expert's number."""
    return f"{module.experts.removeprefix(prefix)}.*.{name.rpartition('.')[2]}"


def _folded(layer: LayerPlan) -> dict[str, int]:
    """Numbers of the linears whose weights are changed before the layer's groups are solved, by name."""
    groups = {fold.group for fold in layer.linear_folds}
    names = {fold.linear for fold in layer.linear_folds}
    return {
        module.name: prod(module.shape)
        for module in layer.modules
        if module.name in names or module.group in groups
    }
