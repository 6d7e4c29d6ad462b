"""What there is to choose from, in words: methods and schemes, for people and for programs that ask a server.

What a scheme is follows from its data; what methods are worth is said after their papers and LLM Compressor's
guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compression.peer_recipe import STEP_TYPES
from compression.schemes import ALIASES, SCHEMES, SPARSE_SCHEMES, QuantizationArgs, Scheme

_QUANTIZING, _PRUNING = ("rtn", "gptq"), ("sparsegpt", "wanda", "magnitude")
_SMOOTHING = ("awq", "smoothquant")


@dataclass(frozen=True)
class Method:
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


def methods() -> Sequence[Method]:
    """Every type of step."""
    return [
        _method(
            "rtn",
            "Rounds every weight to the nearest code.",
            "Moderate recovery in most cases; computationally cheap and fast, and without data.",
            needs_calibration=False,
        ),
        _method(
            "gptq",
            "Rounds column by column, and moves the error of each into those that follow.",
            "High recovery, but more expensive and slower to run: statistics of every input, and a "
            "walk over its columns.",
            source="https://arxiv.org/abs/2210.17323",
        ),
        _method(
            "awq",
            "Scales up the channels that matter, and down in the norm or linear in front.",
            "Better recovery with a faster runtime than GPTQ, says LLM Compressor's guide; here "
            "its search of scales takes more passes of the data.",
            source="https://arxiv.org/abs/2306.00978",
        ),
        _method(
            "smoothquant",
            "Moves outliers of activations into the weights, by folding scales into the norms.",
            "Good recovery where activations are quantized too, with minimal calibration time; to "
            "be composed with other methods.",
            source="https://arxiv.org/abs/2211.10438",
        ),
        _method(
            "sparsegpt",
            "Prunes column by column, and makes up for each in those that follow.",
            "The highest recovery of the three that prune; as slow as gptq.",
            source="https://arxiv.org/abs/2301.00774",
        ),
        _method(
            "wanda",
            "Prunes by weight times input norm, row by row.",
            "Moderate recovery; hardly any time beside the statistics.",
            source="https://arxiv.org/abs/2306.11695",
        ),
        _method(
            "magnitude",
            "Prunes the smallest weights.",
            "Low recovery; the cheapest, and without data.",
            needs_calibration=False,
        ),
    ]


def schemes() -> Sequence[SchemeRow]:
    """Every preset, and what pruning makes."""
    return [*map(_quantized, SCHEMES.values()), *map(_sparse, SPARSE_SCHEMES)]


def _method(
    name: str,
    description: str,
    recovery: str,
    *,
    needs_calibration: bool = True,
    source: str = "",
) -> Method:
    aliases = tuple(alias for alias, step in STEP_TYPES.items() if step == name)
    alone = _SMOOTHING if name in _SMOOTHING else (name,)  # of those that smooth, one
    others = tuple(each for each in (*_QUANTIZING, *_PRUNING, *_SMOOTHING) if each not in alone)
    return Method(name, aliases, description, needs_calibration, others, recovery, source)


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
        (*_QUANTIZING, *_SMOOTHING),
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
        _PRUNING,
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
