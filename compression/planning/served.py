"""What vLLM's kernels take, and what of a plan they do not: read in the source of vLLM 0.32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compression.errors import Problem
from compression.schemes import SERVED_BITS, SERVED_GROUP_SIZES, Scheme

NOT_SERVED = "not_served_by_vllm"


_REORDERED = {"Llama4ForCausalLM": (".q_proj", ".k_proj")}
"""Linears whose rows vLLM puts in another order when it loads a model, to rotate them as it does others."""


def unserved(number: int, scheme: Scheme, fused: Iterable[Sequence[int]]) -> list[Problem]:
    """Why vLLM would not run what step `number` makes.

    fused: for each matrix that vLLM makes of several linears, their output sizes in the order of the model.
    """
    weights = scheme.weights
    pointer = f"/recipe/steps/{number}"
    problems = []
    if weights.type == "int" and weights.num_bits not in SERVED_BITS:
        message = f"vLLM's own kernels do not take {weights.num_bits}-bit weights."
        hint = "They take 4 and 8 bits; others need the optional Humming kernels."
        problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/scheme"))
    if scheme.takes_group_size and weights.group_size and weights.group_size not in SERVED_GROUP_SIZES:
        message = f"vLLM has no kernel for group_size {weights.group_size}."
        hint = "It runs 128, 64, 32 and one scale per channel."
        problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/group_size"))
    if weights.block_structure is not None:
        height = weights.block_structure[0]
        # the last part may end within a block; an earlier one would end within the next one's first
        misfits = sorted({size for sizes in fused for size in sizes[:-1] if size % height})
        if misfits:
            message = f"vLLM fuses linears of which some have {', '.join(map(str, misfits))} outputs."
            hint = f"Its blocks take multiples of {height}. Use FP8_DYNAMIC, or leave these linears out."
            problems.append(Problem(NOT_SERVED, message, hint, f"{pointer}/scheme"))
    return problems


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
