"""Quantization schemes, as data.

A scheme says how weights and input activations are represented, and in which compressed-tensors format
they are stored. Names are LLM Compressor's presets; ALIASES adds the names people also write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from compression.errors import PlanError, Problem

NumberType = Literal["int", "float"]
Strategy = Literal["tensor", "channel", "group", "tensor_group", "block", "token"]
ScaleDtype = Literal["F8_E4M3", "E8M0"]
Observer = Literal["minmax", "mse", "imatrix", "gram"]
"""How scales are found: `compression.math.search` says what each does."""

SERVED_GROUP_SIZES = (128, 64, 32)
"""Group sizes that vLLM has weight-only kernels for, the largest first."""
SERVED_BITS = (4, 8)
"""Widths of int weights that they take."""


_LARGEST_FLOAT = {4: 6.0, 8: 448.0}
"""Largest number of the float types, by their bits: e2m1 and e4m3fn."""


@dataclass(frozen=True)
class QuantizationArgs:
    """How one kind of tensor is represented.

    strategy: `tensor` = one scale; `channel` = one per output row of a weight [out, in]; `group` = one per
    row and `group_size` consecutive columns; `tensor_group` = the same in two levels, group scales in units
    of one global scale; `block` = one per `block_structure` (rows, columns) of a weight; `token` = one per
    token of an activation. dynamic: found at run time, "local" all but the global scale. scale_dtype: what
    scales are stored in (E8M0: powers of two), None for the dtype of the weights.
    """

    num_bits: int
    type: NumberType
    strategy: Strategy
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    scale_dtype: ScaleDtype | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest representable code."""
        if self.type == "float":
            return -_LARGEST_FLOAT[self.num_bits], _LARGEST_FLOAT[self.num_bits]
        return float(-(2 ** (self.num_bits - 1))), float(2 ** (self.num_bits - 1) - 1)

    @property
    def is_fp4(self) -> bool:
        """Whether codes are four-bit floats (e2m1)."""
        return self.type == "float" and self.num_bits == 4

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None for all of a row."""
        return self.block_structure[1] if self.block_structure else self.group_size

    @property
    def by_row(self) -> QuantizationArgs:
        """The same grid where each row has scales of its own, as float numbers."""
        strategy: Strategy = "channel" if self.columns is None else "group"
        resolved = replace(self, strategy=strategy, group_size=self.columns)
        return replace(resolved, block_structure=None, scale_dtype=None)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the scales of a weight (out, in)."""
        rows, columns = shape
        if self.strategy == "tensor":
            return (1,)
        if self.block_structure:
            rows = -(-rows // self.block_structure[0])
        return (rows, -(-columns // (self.columns or columns)))


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

    @property
    def takes_group_size(self) -> bool:
        """Whether the group size is a choice: for float types readers fix it."""
        return self.weights.type == "int" and self.weights.strategy == "group"

    @property
    def served_group_sizes(self) -> tuple[int | None, ...]:
        """Group sizes that vLLM has kernels for, None for a scale per channel; empty where none is chosen."""
        activations = self.input_activations
        if self.format != "pack-quantized":
            return ()
        if activations is not None and activations.type == "float":
            return (128,)
        return (*SERVED_GROUP_SIZES, None)

    @property
    def read_in_bfloat16(self) -> bool:
        """Whether readers compute in bfloat16 only.

        compressed-tensors 0.20 dequantizes to it what has scales of a dtype of their own, whatever the model
        is in, and its first forward dies; vLLM's kernels of MX formats take nothing else.
        """
        return self.weights.scale_dtype is not None

    @property
    def fixed_input(self) -> str | None:
        """Name of the tensor that says how activations are quantized, where calibration fixes that."""
        if self.input_activations is None or self.input_activations.dynamic is True:
            return None
        return "input_global_scale" if self.input_activations.dynamic == "local" else "input_scale"


def _int(bits: int, *, symmetric: bool = True) -> QuantizationArgs:
    return QuantizationArgs(bits, "int", "group", symmetric, group_size=128)


def _mx(bits: int, *, dynamic: bool) -> QuantizationArgs:
    return QuantizationArgs(bits, "float", "group", group_size=32, dynamic=dynamic, scale_dtype="E8M0")


_INT8_TOKEN = QuantizationArgs(8, "int", "token", dynamic=True)
_FP8_TOKEN = QuantizationArgs(8, "float", "token", dynamic=True)
_FP8_TENSOR = QuantizationArgs(8, "float", "tensor")
_FP8_GROUP = QuantizationArgs(8, "float", "group", group_size=128, dynamic=True)
_FP8_BLOCK = QuantizationArgs(8, "float", "block", block_structure=(128, 128))
_NVFP4 = QuantizationArgs(4, "float", "tensor_group", group_size=16, scale_dtype="F8_E4M3")
_NVFP4_LOCAL = replace(_NVFP4, dynamic="local")

_PRESETS = (
    Scheme("W3A16", _int(3), None, "pack-quantized"),
    Scheme("W4A16", _int(4), None, "pack-quantized"),
    Scheme("W8A16", _int(8), None, "pack-quantized"),
    Scheme("W4A16_ASYM", _int(4, symmetric=False), None, "pack-quantized"),
    Scheme("W4A8", _int(4), _INT8_TOKEN, "pack-quantized"),
    Scheme("W4AFP8", _int(4), _FP8_TOKEN, "pack-quantized"),
    Scheme("W8A8", QuantizationArgs(8, "int", "channel"), _INT8_TOKEN, "int-quantized"),
    Scheme("FP8", _FP8_TENSOR, _FP8_TENSOR, "float-quantized"),
    Scheme("FP8_DYNAMIC", QuantizationArgs(8, "float", "channel"), _FP8_TOKEN, "float-quantized"),
    Scheme("FP8_BLOCK", _FP8_BLOCK, _FP8_GROUP, "float-quantized"),
    Scheme("MXFP8A16", _mx(8, dynamic=False), None, "mxfp8-quantized"),
    Scheme("MXFP8", _mx(8, dynamic=False), _mx(8, dynamic=True), "mxfp8-quantized"),
    Scheme("MXFP4A16", _mx(4, dynamic=False), None, "mxfp4-pack-quantized"),
    Scheme("MXFP4", _mx(4, dynamic=False), _mx(4, dynamic=True), "mxfp4-pack-quantized"),
    Scheme("NVFP4A16", _NVFP4, None, "nvfp4-pack-quantized"),
    Scheme("NVFP4", _NVFP4, _NVFP4_LOCAL, "nvfp4-pack-quantized"),
)

KV_CACHE = _FP8_TENSOR
"""How keys and values are cached where a recipe says so: one scale for a layer's keys, one for its values."""

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
