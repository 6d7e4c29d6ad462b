"""Which step of a recipe compresses which linear, with which group size, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compression.errors import Problem, some
from compression.families.decoder import LM_HEAD
from compression.planning.served import unserved
from compression.planning.targets import MAX_EXPRESSIONS, matcher, pattern_problem
from compression.recipe import Recipe
from compression.schemes import SERVED_GROUP_SIZES, Scheme, get_scheme
from compression.steps import PruningStep, QuantizingStep


@dataclass(frozen=True)
class Linear:
    """A linear of the model: shape (out, in), layer (None outside), and the id of the input it shares.

    experts: the module of which it is a part of one expert, or "". gate: it is never compressed.
    """

    name: str
    shape: tuple[int, int]
    layer: int | None
    group: str
    experts: str = ""
    gate: bool = False


@dataclass(frozen=True)
class Assignment:
    """The steps of one linear. step, pruning: their positions in the recipe; with neither it is kept, for
    `reason`."""

    scheme: Scheme | None
    step: int | None
    pruning: int | None
    reason: str = ""


@dataclass
class Assignments:
    """Every linear with its steps, in forward order, and what was found on the way."""

    modules: list[tuple[Linear, Assignment]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def assign_steps(linears: Sequence[Linear], module_names: Sequence[str], recipe: Recipe) -> Assignments:
    """Apply the recipe's patterns. module_names: every module with tensors, linear or not."""
    result = Assignments()
    steps: dict[int, QuantizingStep | PruningStep] = {**recipe.pruning, **recipe.quantizing}
    for number, step in steps.items():
        problems = _pattern_problems(number, step, linears, module_names)
        unmatched = [] if recipe.strict else [p for p in problems if _is_unmatched_ignore(p)]
        result.problems += [problem for problem in problems if problem not in unmatched]
        result.warnings += unmatched
    if any(problem.code == "pattern_invalid" for problem in result.problems):
        return result
    chosen, pruned = _choose(linears, recipe.quantizing), _choose(linears, recipe.pruning)
    any_step = [(linear, step) for linear, (step, _) in (*chosen, *pruned) if step is not None]
    if any(linear.name == LM_HEAD for linear, _ in any_step):
        result.problems.append(
            Problem(
                "lm_head_not_supported",
                "The recipe targets lm_head, which is not compressed yet.",
                'Add "lm_head" to ignore.',
                "/recipe/steps/0/ignore",
            )
        )
    if all(linear.name == LM_HEAD for linear, _ in any_step) and not result.problems:
        result.problems.append(
            Problem(
                "nothing_to_compress",
                "No linear is left to compress: targets and ignore exclude each other.",
                'Widen targets ("Linear" means every linear) or shorten ignore.',
                "/recipe/steps/0/targets",
            )
        )
    result.problems += _fused_problems(chosen)
    schemes = {}
    for number, step in recipe.quantizing.items():
        members = [linear for linear, (index, _) in chosen if index == number and linear.name != LM_HEAD]
        schemes[number] = _resolve(number, step, [linear.shape[1] for linear in members], result)
        result.problems += _zero_point_problems(number, schemes[number], members)
        if any(linear.experts for linear in members):
            result.problems += _expert_problems(number, schemes[number])
        together = [[linear for linear, _ in m] for m in _fused(chosen) if m[0][1] == number]
        matrices = [[linear.shape[0] for linear in m] for m in together if not m[0].experts]
        experts = [[linear.shape for linear in m] for m in together if m[0].experts]
        result.warnings += unserved(number, schemes[number], matrices, experts)
    for number, pruning in recipe.pruning.items():
        result.problems += _structure_problems(
            number, pruning, {linear.shape[1] for linear, index in any_step if index == number}
        )
    for (linear, (index, reason)), (_, (pruning_index, _)) in zip(chosen, pruned, strict=True):
        scheme = None if index is None else schemes[index]
        result.modules.append((linear, Assignment(scheme, index, pruning_index, reason)))
    return result


def _choose(
    linears: Sequence[Linear], steps: Mapping[int, QuantizingStep | PruningStep]
) -> list[tuple[Linear, tuple[int | None, str]]]:
    """For each linear the first of `steps` that wants it, or why none does."""
    wants = [(number, matcher(step.targets), matcher(step.ignore)) for number, step in steps.items()]
    chosen = []
    for linear in linears:
        choice: tuple[int | None, str] = (None, "a gate" if linear.gate else "no step targets it")
        for number, targets, ignore in wants:
            if not linear.gate and targets(linear.name, True):
                if not ignore(linear.name, True):
                    choice = (number, "")
                    break
                choice = (None, "ignored by the recipe")
        chosen.append((linear, choice))
    return chosen


def _pattern_problems(
    number: int, step: QuantizingStep | PruningStep, linears: Sequence[Linear], module_names: Sequence[str]
) -> list[Problem]:
    """Patterns that cannot be used or match nothing. Targets mean linears, ignore any module."""
    problems = []
    linear_names = {linear.name for linear in linears}
    for where, patterns, names in (
        ("targets", step.targets, sorted(linear_names)),
        ("ignore", step.ignore, module_names),
    ):
        if sum(pattern.startswith("re:") for pattern in patterns) > MAX_EXPRESSIONS:
            message = f"{where} holds more than {MAX_EXPRESSIONS} regular expressions."
            problems.append(
                Problem("pattern_invalid", message, "Join them.", f"/recipe/steps/{number}/{where}")
            )
            continue
        for index, pattern in enumerate(patterns):
            pointer = f"/recipe/steps/{number}/{where}/{index}"
            problem = pattern_problem(pattern, pointer)
            if problem is None:
                matches = matcher([pattern])
                if any(matches(name, name in linear_names) for name in names):
                    continue
                problem = Problem(
                    "pattern_matches_nothing",
                    f"The pattern {pattern[:100]!r} in {where} matches no module of this model.",
                    f'Use module names such as {linears[0].name}, "Linear", or re: and a regular '
                    r"expression (re:.*mlp\.down_proj).",
                    pointer,
                )
            problems.append(problem)
    return problems


def _is_unmatched_ignore(problem: Problem) -> bool:
    """Whether a pattern that leaves modules out finds none: the result is the one that was asked for."""
    return problem.code == "pattern_matches_nothing" and "/ignore/" in problem.pointer


def _structure_problems(number: int, step: PruningStep, widths: set[int]) -> list[Problem]:
    """Inputs that do not consist of whole groups of a mask structure."""
    if step.structure is None or not (misfits := sorted(w for w in widths if w % step.structure[1])):
        return []
    return [
        Problem(
            "mask_structure_does_not_divide",
            f"mask_structure {step.mask_structure} does not divide every input ({_listed(misfits)}).",
            'Use "unstructured", or leave these linears out with ignore.',
            f"/recipe/steps/{number}/mask_structure",
        )
    ]


_Chosen = Sequence[tuple[Linear, tuple[int | None, str]]]


def _fused(chosen: _Chosen) -> list[list[tuple[Linear, int | None]]]:
    """Linears that vLLM makes one matrix of, a module's that read one input, or all experts of a layer; each
    with the step it has."""
    groups: dict[tuple[str, str], list[tuple[Linear, int | None]]] = {}
    for linear, (step, _) in chosen:
        module = linear.name.rpartition(".")[0]
        together = (linear.experts, "") if linear.experts else (linear.group, module)
        groups.setdefault(together, []).append((linear, step))
    return list(groups.values())


def _fused_problems(chosen: _Chosen) -> list[Problem]:
    """All linears that vLLM fuses have one step, or none has any."""
    split = [members for members in _fused(chosen) if len({step for _, step in members}) > 1]
    if not split:
        return []
    members = split[0]
    compressed = [linear.name for linear, step in members if step is not None]
    kept = [linear.name for linear, step in members if step is None]
    how = f"{some(compressed)} compressed, {some(kept)} not" if kept else some(compressed)
    return [
        Problem(
            "fused_group_mismatch",
            f"Linears that vLLM fuses have different steps in {len(split)} groups; the first: {how}.",
            "Name all of q_proj, k_proj, v_proj, both of gate_proj, up_proj, and all experts of a layer, in "
            "targets or in ignore.",
            "/recipe/steps/0/targets",
        )
    ]


def _resolve(number: int, step: QuantizingStep, columns: Sequence[int], result: Assignments) -> Scheme:
    """The step's scheme with its group size decided; problems and warnings go to the result."""
    scheme = get_scheme(step.scheme)
    pointer = f"/recipe/steps/{number}/group_size"
    if not scheme.takes_group_size:
        if isinstance(step.group_size, int):
            result.problems.append(
                Problem(
                    "group_size_not_applicable",
                    f"{scheme.name} has {_scales(scheme)}, so group_size does not apply.",
                    "Leave group_size out.",
                    pointer,
                )
            )
        result.problems += _columns_problems(number, scheme, columns)
        return scheme
    fitting = [size for size in SERVED_GROUP_SIZES if all(width % size == 0 for width in columns)]
    if step.group_size == "auto":
        return scheme.with_group_size(fitting[0] if fitting else None)
    size = step.group_size or scheme.weights.group_size
    misfits = sorted({width for width in columns if size and width % size})
    if misfits:
        usable = f"of 128, 64 and 32, {_listed(fitting)} would" if fitting else "none of 128, 64 and 32 would"
        result.problems.append(
            Problem(
                "group_size_does_not_divide",
                f"group_size {size} does not divide every target's input ({_listed(misfits)}); {usable}.",
                f'Use group_size {fitting[0]} or "auto".' if fitting else 'Use group_size "auto".',
                pointer,
            )
        )
    return scheme.with_group_size(size)


def _expert_problems(number: int, scheme: Scheme) -> list[Problem]:
    """A range of activations that calibration fixes, for experts that may see no token of it."""
    if scheme.fixed_input is None:
        return []
    return [
        Problem(
            "experts_need_dynamic_activations",
            f"{scheme.name} fixes the range of activations by calibration; experts may see no token of it.",
            "Use a scheme that finds it at run time or needs none, such as FP8_DYNAMIC or NVFP4A16.",
            f"/recipe/steps/{number}/scheme",
        )
    ]


def _zero_point_problems(number: int, scheme: Scheme, linears: Sequence[Linear]) -> list[Problem]:
    """Linears with several groups, the zero points of each in one word: compressed-tensors 0.20 packs them,
    and cannot unpack them."""
    args = scheme.weights
    unreadable = [
        f"{linear.name} has {linear.shape[0]}"
        for linear in linears
        if not args.symmetric
        and linear.shape[0] * args.num_bits <= 32
        and args.scale_shape(linear.shape)[1] > 1
    ]
    if not unreadable:
        return []
    return [
        Problem(
            "too_few_outputs",
            "compressed-tensors 0.20 cannot read the zero points of linears with "
            f"{32 // args.num_bits} outputs or fewer: {some(unreadable)}.",
            "Use the symmetric W4A16, or leave these linears out with ignore.",
            f"/recipe/steps/{number}/scheme",
        )
    ]


def _scales(scheme: Scheme) -> str:
    """What has a scale in this scheme's weights."""
    if scheme.weights.columns is None:
        return "one scale for each " + ("tensor" if scheme.weights.strategy == "tensor" else "output channel")
    return f"one scale for each {scheme.weights.columns} columns"


def _columns_problems(number: int, scheme: Scheme, columns: Sequence[int]) -> list[Problem]:
    """Inputs that do not consist of whole groups of a scheme in which group sizes are fixed.

    The rows of a block need not be whole: compressed-tensors and vLLM both round their number up.
    """
    kinds = [scheme.weights, *([scheme.input_activations] if scheme.input_activations else [])]
    sizes = {args.columns for args in kinds if args.columns}
    misfits = sorted({width for width in columns for size in sizes if width % size})
    if not misfits:
        return []
    return [
        Problem(
            "group_size_does_not_divide",
            f"{scheme.name} has groups of {max(sizes)} columns, which do not divide every target's input "
            f"({_listed(misfits)}).",
            "Use a scheme with smaller groups or one scale per channel, such as FP8_DYNAMIC, or leave these "
            "linears out with ignore.",
            f"/recipe/steps/{number}/scheme",
        )
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
