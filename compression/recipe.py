"""What to do: the recipe, the data it learns from, and how the result is measured.

Everything here is frozen pydantic: it validates what people write, and its canonical JSON is what a job's
identity is computed from. Two spellings of the same recipe have the same canonical JSON.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compression.errors import PlanError, Problem
from compression.hub.presets import PRESETS
from compression.hub.references import HubRef
from compression.peer_recipe import STEP_TYPES, is_peer_recipe, peer_steps
from compression.schemes import get_scheme, sparse_fields

Observer = Literal["minmax", "mse", "imatrix", "gram"]
GroupSize = Annotated[int, Field(ge=1)] | Literal["auto"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _TargetedStep(_Frozen):
    """What every step has that changes linears.

    targets, ignore: module names, `re:` patterns, or the class name `Linear`; ignore wins.
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class KVCacheScheme(_Frozen):
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
    block_size: int = Field(default=128, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, gt=0, le=1)
    actorder: Literal["static"] | None = "static"


class _PruningStep(_TargetedStep):
    """What every pruning step has.

    sparsity: share of a linear's weights that becomes 0. mask_structure: "unstructured", or "n:m", where n of
    every m consecutive weights of a row stay and sparsity is 1 - n/m.
    """

    sparsity: float = Field(default=0.5, gt=0, lt=1)
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
    block_size: int = Field(default=128, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, gt=0, le=1)


class SmoothQuantStep(_Frozen):
    """Moves outliers of activations into the weights that read them, before these are quantized (Xiao et al.,
    2022, arXiv:2211.10438, equation 4).

    smoothing_strength: 0 leaves the range to the activations, 1 gives all of it to the weights.
    """

    type: Literal["smoothquant"] = "smoothquant"
    smoothing_strength: float = Field(default=0.5, ge=0, le=1)


class AWQStep(_Frozen):
    """Scales up, before the linears are quantized, the channels that matter, and down in the norm or linear
    in front of them (Lin et al., 2023, arXiv:2306.00978, section 3.2).

    n_grid: exponents that are tried. duo_scaling: whether the weights' magnitudes count beside those of the
    activations; "both" tries with and without. offload_device: accepted and without effect, since activations
    are never all on the device.
    """

    type: Literal["awq"] = "awq"
    n_grid: int = Field(default=20, ge=1, le=1000)
    duo_scaling: bool | Literal["both"] = True
    offload_device: Literal["cpu"] | None = Field(default=None, exclude=True)


QuantizingStep = RTNStep | GPTQStep
PruningStep = MagnitudeStep | WandaStep | SparseGPTStep
SmoothingStep = SmoothQuantStep | AWQStep
Step = Annotated[QuantizingStep | PruningStep | SmoothingStep, Field(discriminator="type")]

QUANTIZING, PRUNING = ("gptq", "rtn", "awq"), ("sparsegpt", "wanda", "magnitude")
"""The methods of the short form: what makes a scheme, and what makes a sparse one."""

_OF_AWQ = frozenset({"type", *AWQStep.model_fields})


def _written_out(step: Any) -> list[Any]:
    """A step as people write it -> the steps it stands for. AWQ with a scheme: AWQ, then round to nearest."""
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return [step]
    step = {**step, "type": STEP_TYPES.get(step["type"], step["type"])}
    if step["type"] != "awq" or "scheme" not in step:
        return [step]
    own = {key: value for key, value in step.items() if key in _OF_AWQ}
    rounding = {key: value for key, value in step.items() if key not in _OF_AWQ}
    return [own, {**rounding, "type": "rtn"}]


class Recipe(_Frozen):
    """An ordered list of steps: at most one that smooths, then those that prune, then those that quantize.

    A linear is pruned by the first pruning step that targets it, and what is left of it is quantized by the
    first quantizing step that does.
    """

    steps: tuple[Step, ...] = Field(min_length=1, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = {"steps": value}
        elif isinstance(value, dict) and is_peer_recipe(value):
            value = {"steps": peer_steps(value)}
        if isinstance(value, dict) and isinstance(value.get("steps"), list | tuple):
            return {**value, "steps": [part for step in value["steps"] for part in _written_out(step)]}
        return value

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        if not self.quantizing and not self.pruning:
            raise ValueError("a recipe needs a step that quantizes or prunes, such as gptq or sparsegpt")
        if any(isinstance(step, SmoothingStep) for step in self.steps[1:]):
            raise ValueError("smoothquant or awq is the first step, once, and not both")
        if self.steps[0].type == "awq" and not self.quantizing:
            raise ValueError("awq needs a scheme, or a step after it that quantizes, such as rtn or gptq")
        if self.quantizing and self.pruning and max(self.pruning) > min(self.quantizing):
            raise ValueError("steps that prune come before those that quantize")
        if sum(step.kv_cache_scheme is not None for step in self.quantizing.values()) > 1:
            raise ValueError("kv_cache_scheme belongs to one step: it is of the whole model")
        return self

    @classmethod
    def from_short(
        cls,
        scheme: str,
        *,
        method: str | None = None,
        has_dataset: bool,
        **options: Any,
    ) -> Recipe:
        """The recipe of the short form.

        Default method: gptq for int and fp4 weights with a dataset, else rtn; for a sparse scheme sparsegpt
        with a dataset, else magnitude.

        Raises:
            PlanError: `unknown_scheme`, `method_does_not_fit`.
        """
        given = {name: value for name, value in options.items() if value is not None}
        sparse = sparse_fields(scheme)
        fitting, others = (QUANTIZING, PRUNING) if sparse is None else (PRUNING, QUANTIZING)
        if method in others:
            message = f"{method} does not make {scheme}."
            raise PlanError(
                Problem("method_does_not_fit", message, f"Use one of {', '.join(fitting)}.", "/method")
            )
        if sparse is not None:
            method = method or ("sparsegpt" if has_dataset else "magnitude")
            return cls.model_validate({"steps": [{"type": method, **sparse, **given}]})
        if method is None:
            weights = get_scheme(scheme).weights
            coarse = weights.type == "int" or weights.num_bits == 4
            method = "gptq" if coarse and has_dataset else "rtn"
        return cls.model_validate({"steps": [{"type": method, "scheme": scheme, **given}]})

    @property
    def smoothing(self) -> SmoothingStep | None:
        """The step that moves scales between layers, if there is one."""
        first = self.steps[0]
        return first if isinstance(first, SmoothingStep) else None

    @property
    def quantizing(self) -> dict[int, QuantizingStep]:
        """Position in the recipe -> step, of those that quantize."""
        return {number: step for number, step in enumerate(self.steps) if isinstance(step, QuantizingStep)}

    @property
    def pruning(self) -> dict[int, PruningStep]:
        """Position in the recipe -> step, of those that prune."""
        return {number: step for number, step in enumerate(self.steps) if isinstance(step, PruningStep)}

    @property
    def kv_cache_step(self) -> int | None:
        """Position of the step that says how keys and values are cached."""
        return next((n for n, step in self.quantizing.items() if step.kv_cache_scheme is not None), None)

    @property
    def representation(self) -> str:
        """What weights become, by the names of schemes: "W4A16", "SPARSE_2OF4+W8A8"."""
        names = [step.representation for step in self.pruning.values()]
        names += [step.scheme for step in self.quantizing.values()]
        return "+".join(dict.fromkeys(names))

    @property
    def needs_data(self) -> bool:
        """Whether any step cannot be solved without calibration data."""
        return (
            self.smoothing is not None
            or self.kv_cache_step is not None
            or any(step.type != "magnitude" for step in self.pruning.values())
            or any(
                step.type == "gptq"
                or step.observer in ("imatrix", "gram")
                or get_scheme(step.scheme).fixed_input
                for step in self.quantizing.values()
            )
        )

    def canonical_json(self) -> str:
        """Sorted keys, every default written out, no spaces: the same text for the same recipe."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


DATASET_SUFFIXES = (".jsonl", ".parquet", ".csv", ".txt")
"""Of local files that text is read from."""


class DatasetSpec(_Frozen):
    """Where calibration text comes from. Exactly one of `path`, `hub` and `texts`.

    path: a local .jsonl, .parquet, .csv or .txt file (one document a line of JSON or a row; a text file is
    split at blank lines). hub: the name of a preset (c4, open_platypus, ultrachat_200k, wikitext), or
    `owner/name`, or either with `@revision`; config and split: which part of it; by default what the preset
    says, else `train` of the only config.

    text_column: the column that holds the text; by default the first there is of text, content, messages,
    prompt. messages_column: a column with chat messages, each with a role, to which the model's chat template
    is applied.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    texts: tuple[str, ...] | None = None
    text_column: str | None = None
    messages_column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        """A string is a file's path if it looks like one, else a name on the Hub if it can be one."""
        if not isinstance(value, str):
            return value
        is_file = value.startswith(("/", ".", "~")) or value.lower().endswith(DATASET_SUFFIXES)
        return {"path" if is_file or not _is_on_hub(value) else "hub": value}

    @model_validator(mode="after")
    def _one_source(self) -> DatasetSpec:
        if sum(source is not None for source in (self.path, self.hub, self.texts)) != 1:
            raise ValueError("give exactly one of path, hub and texts")
        if self.hub is None and (self.config is not None or self.split is not None):
            raise ValueError("config and split are parts of a dataset on the Hub: give hub")
        if self.hub is not None and not _is_on_hub(self.hub):
            raise ValueError(
                f"hub is owner/name or one of {', '.join(PRESETS)}, either with @revision or without"
            )
        if self.text_column is not None and self.messages_column is not None:
            raise ValueError("give at most one of text_column and messages_column")
        return self


def _is_on_hub(text: str) -> bool:
    """Whether a text can be a dataset's name on the Hub."""
    return HubRef.parse(text) is not None or text.partition("@")[0] in PRESETS


class Calibration(_Frozen):
    """How text becomes calibration samples.

    With packing, one sample is one block of max_seq_length tokens; without, one sample is one document,
    truncated to max_seq_length. seed: which documents are held out and in which order blocks are drawn.
    """

    num_calibration_samples: int = Field(default=512, ge=1, le=1_000_000)
    max_seq_length: int = Field(default=2048, ge=2, le=1 << 20)
    packing: bool = True
    seed: int = Field(default=0, ge=0, lt=1 << 63)


class Evaluation(_Frozen):
    """The side-by-side measurement on held-out text.

    num_samples: blocks of max_seq_length; by default 1/16 of the calibration samples, at least 2,048 tokens.
    """

    enabled: bool = True
    num_samples: int | None = Field(default=None, ge=1, le=1_000_000)

    def samples(self, calibration: Calibration) -> int:
        """How many held-out blocks this run uses; 0 when off."""
        if not self.enabled:
            return 0
        if self.num_samples is not None:
            return self.num_samples
        at_least = -(-2048 // calibration.max_seq_length)
        return max(at_least, calibration.num_calibration_samples // 16)
