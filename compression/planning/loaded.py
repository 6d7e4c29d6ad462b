"""What Transformers loads, and what of a plan it does not.

Seen in Transformers 5.23 with compressed-tensors 0.20; tests/conformance/test_transformers.py runs every case
and fails when a reader is mended. Transformers keeps the experts of a layer as one tensor: they are linears
on disk only, which it dequantizes while it loads, by code of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from compression.errors import Problem
from compression.planning.assignment import Assignment, Linear
from compression.schemes import Scheme

NOT_LOADED = "not_loaded_by_transformers"

_READER = "Transformers 5.23 with compressed-tensors 0.20"
_SERVED = "vLLM serves them. Transformers takes experts in W4A16, W8A16, FP8_DYNAMIC and MXFP4A16."
_SEPARATE_EXPERTS = ("Llama4ForCausalLM",)
"""Architectures whose experts Transformers makes linears of when a checkpoint is quantized."""

Modules = Sequence[tuple[Linear, Assignment]]


def unloaded(architecture: str, modules: Modules) -> list[Problem]:
    """Why Transformers would refuse a checkpoint, or read other weights than were written.

    modules: every linear with what becomes of it, in forward order.
    """
    quantized = [(linear, assigned) for linear, assigned in modules if assigned.scheme is not None]
    if not quantized:
        return []
    fused = [] if architecture in _SEPARATE_EXPERTS else [each for each in modules if each[0].experts]
    steps = {assigned.step: assigned.scheme for _, assigned in quantized if assigned.scheme is not None}
    alone = len(steps) == 1 and not fused
    unread = [(step, scheme) for step, scheme in steps.items() if not scheme.weights.symmetric]
    return [_zero_points(step, scheme, alone) for step, scheme in unread] + _experts(fused, quantized[0][1])


def _zero_points(step: int | None, scheme: Scheme, alone: bool) -> Problem:
    """alone: the model has no experts and no other scheme, and can be dequantized while it is loaded."""
    dequantize = "Load it with quantization_config=CompressedTensorsConfig(dequantize=True), or use"
    return _problem(
        f"{_READER} refuses {scheme.name}: it expects zero points that are not packed, against its format.",
        f"vLLM serves it. {dequantize if alone else 'For Transformers use'} the symmetric W4A16.",
        step,
    )


def _experts(experts: Modules, first: Assignment) -> list[Problem]:
    """What is wrong with experts that Transformers keeps as one tensor.

    first: what becomes of the first linear that is quantized. By its scheme experts are read that have none.
    """
    schemes = {assigned.scheme: assigned for _, assigned in experts}
    left = schemes.pop(None, None)
    if len(schemes) > 1:
        names = ", ".join(dict.fromkeys(scheme.name for scheme in schemes if scheme))
        return [
            _problem(
                f"{_READER} reads all experts of a model by one scheme; these have several ({names}).",
                "vLLM serves them. Give the experts of all layers one scheme, with one group size.",
                next(iter(schemes.values())).step,
            )
        ]
    problems = []
    read = next(iter(schemes.values()), first)
    if left is not None and read.scheme is not None and not _is_plain_fp8(read.scheme):
        message = f"{_READER} refuses experts that stay as they are beside linears in {read.scheme.name}."
        hint = "vLLM serves them. Compress the experts of every layer, or use FP8_DYNAMIC for the others."
        problems.append(_problem(message, hint, read.step))
    for scheme, assigned in schemes.items():
        shapes = {linear.shape for linear, each in experts if each.scheme == scheme}
        if scheme and scheme.weights.symmetric and (how := _misread(scheme, shapes)):
            problems.append(_problem(f"{_READER} {how}", _SERVED, assigned.step))
    return problems


def _misread(scheme: Scheme, shapes: set[tuple[int, int]]) -> str:
    """What becomes of experts [out, in] of these shapes when they are loaded; nothing where all is well."""
    weights = scheme.weights
    refused = f"refuses experts in {scheme.name}."
    if weights.strategy == "tensor_group":
        return f"loads experts in {scheme.name} in silence as other weights: without their global scales."
    if scheme.format == "int-quantized" or (_is_plain_fp8(scheme) and weights.scale_dtype):
        return refused
    scales = ((weights.scale_shape(shape), shape) for shape in shapes)
    broadcast = all(part in (1, size) for pair in scales for part, size in zip(*pair, strict=False))
    return refused if _is_plain_fp8(scheme) and not broadcast else ""


def _is_plain_fp8(scheme: Scheme) -> bool:
    """Whether weights are stored as fp8 numbers, as which they are read with and without scales."""
    return scheme.weights.type == "float" and scheme.weights.num_bits == 8


def _problem(message: str, hint: str, step: int | None) -> Problem:
    return Problem(NOT_LOADED, message, hint, f"/recipe/steps/{step}/scheme")
