"""The steps of a recipe, one class each: what they take, with the defaults that people know."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compression.schemes import get_scheme

Observer = Literal["minmax", "mse", "imatrix", "gram"]
GroupSize = Annotated[int, Field(strict=True, ge=1)] | Literal["auto"]

AWQ_ROWS = 128
"""Rows of each linear, evenly spread, on which AWQ tries its scales: docs/adr/0017."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _TargetedStep(Frozen):
    """What every step has that changes linears.

    targets, ignore: module names, `re:` patterns, or the class name `Linear`; ignore wins.
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class KVCacheScheme(Frozen):
    """How a server caches keys and values, in the words of LLM Compressor's kv_cache_scheme.

    What vLLM takes from a checkpoint: fp8, a scale for a layer's keys and one for its values, from data.
    """

    num_bits: Literal[8] = 8
    type: Literal["float"] = "float"
    strategy: Literal["tensor"] = "tensor"
    symmetric: Literal[True] = True
    dynamic: Literal[False] = False


class _QuantizationStep(_TargetedStep):
    """What every quantizing step has.

    scheme: a preset of `compression.schemes`. group_size: overrides the scheme's; "auto" takes the largest of
    128, 64, 32 that divides every target's input, else one scale per channel. kv_cache_scheme: of the whole
    model, so one step of a recipe at most has it.
    """

    scheme: str
    group_size: GroupSize | None = None
    observer: Observer | None = None
    kv_cache_scheme: KVCacheScheme | None = None

    @field_validator("scheme")
    @classmethod
    def _canonical_scheme(cls, name: str) -> str:
        return get_scheme(name).name


class RTNStep(_QuantizationStep):
    """Round to nearest. Without a dataset the observer is minmax or mse (the default)."""

    type: Literal["rtn"] = "rtn"


class GPTQStep(_QuantizationStep):
    """Second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

    block_size: columns whose error is applied together. dampening_frac: fraction of the mean of the Gram
    diagonal added to it. actorder "static": columns in order of falling diagonal, groups as on disk.
    """

    type: Literal["gptq"] = "gptq"
    block_size: int = Field(default=128, strict=True, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, strict=True, gt=0, le=1)
    actorder: Literal["static"] | None = "static"


class _PruningStep(_TargetedStep):
    """What every pruning step has.

    sparsity: share of a linear's weights that becomes 0. mask_structure: "unstructured", or "n:m", where n of
    every m consecutive weights of a row stay and sparsity is 1 - n/m.
    """

    sparsity: float = Field(default=0.5, strict=True, gt=0, lt=1)
    mask_structure: str = "unstructured"

    @model_validator(mode="before")
    @classmethod
    def _structure_decides(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        text = value.get("mask_structure")
        if text in (None, "unstructured", "0:0"):  # LLM Compressor writes 0:0
            return {**value, "mask_structure": "unstructured"}
        n, m = _structure(text)
        if value.get("sparsity", 1 - n / m) != 1 - n / m:
            raise ValueError(f"mask_structure {text} is a sparsity of {1 - n / m:g}")
        return {**value, "sparsity": 1 - n / m}

    @property
    def structure(self) -> tuple[int, int] | None:
        """(n, m), None when unstructured."""
        return None if self.mask_structure == "unstructured" else _structure(self.mask_structure)

    @property
    def representation(self) -> str:
        """A name like those of SPARSE_SCHEMES."""
        if self.structure is None:
            return f"SPARSE_{100 * self.sparsity:g}"
        return "SPARSE_{}OF{}".format(*self.structure)


def _structure(text: object) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]):([1-9]|1[0-6])", text) if isinstance(text, str) else None
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError('mask_structure is "unstructured", or "n:m" with n < m <= 16, such as "2:4"')
    return int(match[1]), int(match[2])


class MagnitudeStep(_PruningStep):
    """Prunes the smallest weights; needs no data."""

    type: Literal["magnitude"] = "magnitude"


class WandaStep(_PruningStep):
    """Prunes by weight times input norm, row by row (Sun et al., 2023, arXiv:2306.11695)."""

    type: Literal["wanda"] = "wanda"


class SparseGPTStep(_PruningStep):
    """Prunes with error feedback (Frantar and Alistarh, 2023, arXiv:2301.00774).

    block_size: columns whose mask is chosen together. dampening_frac: as in GPTQStep.
    """

    type: Literal["sparsegpt"] = "sparsegpt"
    block_size: int = Field(default=128, strict=True, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, strict=True, gt=0, le=1)


class SmoothQuantStep(Frozen):
    """Moves outliers of activations into the weights that read them, before these are quantized (Xiao et al.,
    2022, arXiv:2211.10438, equation 4).

    smoothing_strength: 0 leaves the range to the activations, 1 gives all of it to the weights.
    """

    type: Literal["smoothquant"] = "smoothquant"
    smoothing_strength: float = Field(default=0.5, strict=True, ge=0, le=1)


class AWQStep(Frozen):
    """Scales up, before the linears are quantized, the channels that matter, and down in the norm or linear
    in front of them (Lin et al., 2023, arXiv:2306.00978, section 3.2), so that least is lost when they are
    rounded by the observer of the step that follows.

    n_grid: exponents that are tried. duo_scaling: whether the weights' magnitudes count beside those of the
    activations; "both" tries with and without. offload_device: accepted and without effect, since activations
    are never all on the device.
    """

    type: Literal["awq"] = "awq"
    n_grid: int = Field(default=20, strict=True, ge=1, le=1000)
    duo_scaling: Annotated[bool, Field(strict=True)] | Literal["both"] = True
    offload_device: Literal["cpu"] | None = Field(default=None, exclude=True)


QuantizingStep = RTNStep | GPTQStep
PruningStep = MagnitudeStep | WandaStep | SparseGPTStep
SmoothingStep = SmoothQuantStep | AWQStep
Step = Annotated[QuantizingStep | PruningStep | SmoothingStep, Field(discriminator="type")]

QUANTIZING, PRUNING = ("gptq", "rtn", "awq"), ("sparsegpt", "wanda", "magnitude")
"""The methods of the short form: what makes a scheme, and what makes a sparse one."""
