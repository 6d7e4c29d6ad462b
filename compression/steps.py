"""What the steps of a recipe have in common, by what they do: quantize, prune, or move scales.

The steps themselves, one class for each method, are in `compression.methods`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compression.schemes import Observer, get_scheme

GroupSize = Annotated[int, Field(strict=True, ge=1)] | Literal["auto"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(Frozen):
    """One step. Each has a field `type`, the name of its method."""

    shared_fields: ClassVar[frozenset[str]] = frozenset({"type"})
    """Those that all steps of a kind have; a method's solver takes the others."""

    if TYPE_CHECKING:
        type: str  # a Literal of its own in each step

    @property
    def options(self) -> dict[str, Any]:
        """What the method's solver takes by keyword: fields of this step that others of its kind lack."""
        own = type(self).model_fields.keys() - self.shared_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name in own}


class TargetedStep(Step):
    """What every step has that changes linears.

    targets, ignore: module names, `re:` patterns, or the class name `Linear`; ignore wins.
    """

    shared_fields: ClassVar[frozenset[str]] = Step.shared_fields | {"targets", "ignore"}

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


class QuantizingStep(TargetedStep):
    """What every quantizing step has.

    scheme: a preset of `compression.schemes`. group_size: overrides the scheme's; "auto" takes the largest of
    128, 64, 32 that divides every target's input, else one scale per channel. kv_cache_scheme: of the whole
    model, so one step of a recipe at most has it.
    """

    shared_fields: ClassVar[frozenset[str]] = TargetedStep.shared_fields | {
        "scheme", "group_size", "observer", "kv_cache_scheme",
    }  # fmt: skip

    scheme: str
    group_size: GroupSize | None = None
    observer: Observer | None = None
    kv_cache_scheme: KVCacheScheme | None = None

    @field_validator("scheme")
    @classmethod
    def _canonical_scheme(cls, name: str) -> str:
        return get_scheme(name).name


class PruningStep(TargetedStep):
    """What every pruning step has.

    sparsity: share of a linear's weights that becomes 0. mask_structure: "unstructured", or "n:m", where n of
    every m consecutive weights of a row stay and sparsity is 1 - n/m.
    """

    shared_fields: ClassVar[frozenset[str]] = TargetedStep.shared_fields | {"sparsity", "mask_structure"}

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
    def options(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, "structure": self.structure, **super().options}

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


class SmoothingStep(Step):
    """Moves scales, before linears are quantized, between them and what is in front of them."""
