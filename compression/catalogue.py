"""What there is to choose from, in words: methods and schemes, for people and for programs that ask a server.

What a scheme is follows from its data; what methods are worth is said after their papers and LLM Compressor's
guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.methods import METHODS, Method, method_names
from compression.schemes import ALIASES, SCHEMES, SPARSE_SCHEMES, QuantizationArgs, Scheme


@dataclass(frozen=True)
class MethodRow:
    """A type of step. needs_calibration: whether it learns from data. composes_with: methods that may stand
    in the same recipe. recovery: how much accuracy it keeps, and at what cost."""

    name: str
    aliases: tuple[str, ...]
    description: str
    needs_calibration: bool
    composes_with: tuple[str, ...]
    recovery: str
    source: str


@dataclass(frozen=True)
class SchemeRow:
    """A representation of weights and activations. needs_calibration: whether what it stores depends on data,
    whatever the method. composes_with: methods that make it. recovery: what it keeps, and what it saves."""

    name: str
    aliases: tuple[str, ...]
    description: str
    weights: str
    activations: str
    format: str
    needs_calibration: bool
    composes_with: tuple[str, ...]
    recovery: str


def methods() -> Sequence[MethodRow]:
    """Every type of step."""
    return [_method(method) for method in METHODS.values()]


def schemes() -> Sequence[SchemeRow]:
    """Every preset, and what pruning makes."""
    return [*map(_quantized, SCHEMES.values()), *map(_sparse, SPARSE_SCHEMES)]


def _method(method: Method) -> MethodRow:
    # of those that move scales, one
    alone = method_names("smooths") if method.kind == "smooths" else (method.name,)
    return MethodRow(
        method.name,
        (method.peer_name,) if method.peer_name else (),
        method.description,
        method.needs_data,
        tuple(name for name in method_names("quantizes", "prunes", "smooths") if name not in alone),
        method.recovery,
        method.source,
    )


def _quantized(scheme: Scheme) -> SchemeRow:
    weights = _words(scheme.weights)
    activations = "as they are" if scheme.input_activations is None else _words(scheme.input_activations)
    read = "as they are" if scheme.input_activations is None else f"in {_number(scheme.input_activations)}"
    return SchemeRow(
        scheme.name,
        tuple(alias for alias, name in ALIASES.items() if name == scheme.name),
        f"Weights in {_number(scheme.weights)}, activations {read}.",
        weights,
        activations,
        scheme.format,
        scheme.fixed_input is not None,
        method_names("quantizes", "smooths"),
        _RECOVERY[scheme.weights.num_bits, scheme.input_activations is not None],
    )


_RECOVERY = {
    (3, False): "A fifth of the bytes; a loss that is easy to see, for where nothing larger fits.",
    (4, False): "A quarter of the bytes, fastest in small batches; a small loss.",
    (4, True): "A quarter of the bytes, and products in few bits; a larger loss.",
    (8, False): "Half of the bytes; next to no loss.",
    (8, True): "Half of the bytes, and products in 8 bits, for large batches; next to no loss.",
}
"""By bits of a weight, and whether activations are quantized."""


def _sparse(name: str) -> SchemeRow:
    structure = SPARSE_SCHEMES[name]["mask_structure"]
    what = "any half" if structure == "unstructured" else "two of every four in a row"
    return SchemeRow(
        name,
        (),
        f"Half of the weights are 0: {what}.",
        f"half are 0: {what}",
        "as they are",
        "as the source, zeros included",
        False,
        method_names("prunes"),
        "No bytes are saved: no reader takes a sparse format any more. A large loss without training.",
    )


def _number(args: QuantizationArgs) -> str:
    if args.type == "int":
        return f"int{args.num_bits}"
    return "fp4 (e2m1)" if args.is_fp4 else "fp8 (e4m3)"


def _words(args: QuantizationArgs) -> str:
    """Such as "int4, one scale for a group of 128 columns"."""
    number = _number(args) + ("" if args.symmetric else " with zero points")
    shared = {
        "tensor": "one scale for a tensor",
        "channel": "one scale for an output channel",
        "token": "one scale for a token",
        "group": f"one scale for a group of {args.group_size} columns",
        "tensor_group": f"one fp8 scale for a group of {args.group_size} columns, under one global scale",
        "block": "one scale for a block of {} x {}".format(*(args.block_structure or (0, 0))),
    }[args.strategy]
    if args.scale_dtype == "E8M0":
        shared += ", a power of two"
    found = {"local": ", the global one from data", False: "", True: ""}[args.dynamic]
    return f"{number}, {shared}{found}"
