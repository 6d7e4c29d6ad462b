"""Quantization schemes, as data.

A scheme says how weights and input activations are represented, and in which compressed-tensors format
they are stored. Names are LLM Compressor's presets; ALIASES adds the names people also write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from compression.errors import PlanError, Problem

NumberType = Literal["int", "float"]
Strategy = Literal["channel", "group", "token"]

SERVED_GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM has weight-only kernels for, the largest first."""


@dataclass(frozen=True)
class QuantizationArgs:
    """How one kind of tensor is represented.

    strategy: `channel` = one scale per output row of a weight [out, in]; `group` = one per row and
    `group_size` consecutive input columns; `token` = one per token of an activation, found at run time
    (`dynamic`).
    """

    num_bits: int
    type: NumberType
    strategy: Strategy
    symmetric: bool = True
    group_size: int | None = None
    dynamic: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest representable code."""
        if self.type == "float":
            return -448.0, 448.0  # float8_e4m3fn
        return float(-(2 ** (self.num_bits - 1))), float(2 ** (self.num_bits - 1) - 1)


@dataclass(frozen=True)
class Scheme:
    """A named combination of weight and activation representation."""

    name: str
    weights: QuantizationArgs
    input_activations: QuantizationArgs | None
    format: str

    def with_group_size(self, group_size: int | None) -> Scheme:
        """The same scheme with another group size; None means one scale per channel."""
        strategy: Strategy = "channel" if group_size is None else "group"
        return replace(self, weights=replace(self.weights, strategy=strategy, group_size=group_size))


_FP8_CHANNEL = QuantizationArgs(8, "float", "channel")
_FP8_TOKEN = QuantizationArgs(8, "float", "token", dynamic=True)
_INT8_TOKEN = QuantizationArgs(8, "int", "token", dynamic=True)
_INT3, _INT4, _INT8 = (QuantizationArgs(bits, "int", "group", group_size=128) for bits in (3, 4, 8))

_PRESETS = (
    Scheme("W3A16", _INT3, None, "pack-quantized"),
    Scheme("W4A16", _INT4, None, "pack-quantized"),
    Scheme("W8A16", _INT8, None, "pack-quantized"),
    Scheme(
        "W4A16_ASYM",
        QuantizationArgs(4, "int", "group", symmetric=False, group_size=128),
        None,
        "pack-quantized",
    ),
    Scheme("W4A8", _INT4, _INT8_TOKEN, "pack-quantized"),
    Scheme("W4AFP8", _INT4, _FP8_TOKEN, "pack-quantized"),
    Scheme("W8A8", QuantizationArgs(8, "int", "channel"), _INT8_TOKEN, "int-quantized"),
    Scheme("FP8_DYNAMIC", _FP8_CHANNEL, _FP8_TOKEN, "float-quantized"),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _PRESETS}

ALIASES: dict[str, str] = {
    "INT8": "W8A8",
    "W8A8-INT8": "W8A8",
    "W8A8-FP8": "FP8_DYNAMIC",
}

SPARSE_SCHEMES: dict[str, dict[str, Any]] = {
    "SPARSE_50": {"sparsity": 0.5, "mask_structure": "unstructured"},
    "SPARSE_2OF4": {"mask_structure": "2:4"},
}
"""What pruning steps make, by the names under which people ask for it: fields of the step."""

_HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212_"), "-")


def _key(name: str) -> str:
    """Names ignore case and the kind of hyphen: the guide people copy from writes W8A8\u2011INT8."""
    return name.strip().upper().translate(_HYPHENS)


_BY_KEY = {_key(name): scheme for name, scheme in SCHEMES.items()} | {
    _key(alias): SCHEMES[name] for alias, name in ALIASES.items()
}


def sparse_fields(name: str) -> dict[str, Any] | None:
    """Fields of the pruning step that a name of SPARSE_SCHEMES stands for; None for any other name."""
    return next((fields for key, fields in SPARSE_SCHEMES.items() if _key(key) == _key(name)), None)


def get_scheme(name: str) -> Scheme:
    """The preset of that name or alias.

    Raises:
        PlanError: `unknown_scheme`, with the names there are.
    """
    scheme = _BY_KEY.get(_key(name))
    if scheme is None:
        raise PlanError(
            Problem(
                "unknown_scheme",
                f"There is no scheme named {name!r}.",
                f"Use one of {', '.join([*SCHEMES, *SPARSE_SCHEMES, *ALIASES])}.",
                "/scheme",
            )
        )
    return scheme
