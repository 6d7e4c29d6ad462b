"""What vLLM's kernels take, and what of a plan they do not: read in the source of vLLM 0.32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compression.errors import Problem
from compression.schemes import SERVED_BITS, Scheme

NOT_SERVED = "not_served_by_vllm"


_REORDERED = {"Llama4ForCausalLM": (".q_proj", ".k_proj")}
"""Linears whose rows vLLM puts in another order when it loads a model, to rotate them as it does others."""


def unserved(
    number: int,
    scheme: Scheme,
    matrices: Sequence[Sequence[int]],
    experts: Sequence[Sequence[tuple[int, int]]] = (),
) -> list[Problem]:
    """Why vLLM would not run what step `number` makes.

    matrices: for each that vLLM makes of linears, their output sizes in the order of the model. experts: for
    each layer that has some, the shapes (out, in) of their linears, of which vLLM makes one matrix as well.
    """
    weights = scheme.weights
    pointer = f"/recipe/steps/{number}"
    problems = []
    if weights.type == "int" and weights.num_bits not in SERVED_BITS:
        message = f"vLLM's own kernels do not take {weights.num_bits}-bit weights."
        hint = "They take 4 and 8 bits; others need the optional Humming kernels."
        problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/scheme"))
    sizes = scheme.served_group_sizes
    if sizes and weights.group_size not in sizes:
        given = "one scale per channel" if weights.group_size is None else f"group_size {weights.group_size}"
        message = f"vLLM has no kernel for {scheme.name} with {given}."
        named = ", ".join(str(size) for size in sizes if size)
        hint = f"It runs {named}{' and one scale per channel' if None in sizes else ''}."
        problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/group_size"))
    if sizes and scheme.input_activations is not None:
        problems += _few_bits(scheme, matrices, experts, f"{pointer}/scheme")
    if weights.block_structure is not None:
        height = weights.block_structure[0]
        # the last part may end within a block; an earlier one would end within the next one's first
        fused = [*matrices, *([out for out, _ in layer] for layer in experts)]
        misfits = sorted({size for parts in fused for size in parts[:-1] if size % height})
        if misfits:
            message = f"vLLM fuses linears of which some have {', '.join(map(str, misfits))} outputs."
            hint = f"Its blocks take multiples of {height}. Use FP8_DYNAMIC, or leave these linears out."
            problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/scheme"))
    return problems


def _few_bits(
    scheme: Scheme,
    matrices: Sequence[Sequence[int]],
    experts: Sequence[Sequence[tuple[int, int]]],
    pointer: str,
) -> list[Problem]:
    """int4 weights beside activations of 8 bits, for which vLLM has one kernel each."""
    assert scheme.input_activations is not None
    if scheme.input_activations.type == "int":
        if not experts:
            return []
        message = f"vLLM has no kernel for experts in {scheme.name} on GPUs, nor one that reads them packed."
        return [Problem(NOT_SERVED, message, "Use W4A16, W4AFP8 or W8A8 for them.", pointer)]
    wide = sorted({size for parts in matrices if (size := sum(parts)) % 128})
    thin = sorted({size for layer in experts for shape in layer for size in shape if size % 256})
    if not wide and not thin:
        return []
    listed = ", ".join(map(str, [*wide, *thin]))
    message = f"vLLM's kernel for {scheme.name} does not take all sizes of this model ({listed})."
    hint = "It takes outputs in multiples of 128, and experts in multiples of 256. Use W4A16."
    return [Problem(NOT_SERVED, message, hint, pointer)]


def reordered(architecture: str, quantized: Iterable[tuple[str, int | None, Scheme | None]]) -> list[Problem]:
    """Zero points and scales of blocks, which do not follow the rows that vLLM reorders.

    quantized: name of each linear, and the step and scheme by which it is quantized.
    """
    names = _REORDERED.get(architecture, ())
    left = {
        step: scheme
        for name, step, scheme in quantized
        if scheme
        and name.endswith(names)
        and (scheme.weights.block_structure or not scheme.weights.symmetric)
    }
    return [
        Problem(
            NOT_SERVED,
            f"vLLM reorders the rows of q_proj and k_proj of {architecture}, but not what {scheme.name} "
            "stores for several rows together.",
            "Leave q_proj, k_proj and v_proj out with ignore, or use a scheme without zero points or blocks.",
            f"/recipe/steps/{step}/scheme",
        )
        for step, scheme in left.items()
    ]
