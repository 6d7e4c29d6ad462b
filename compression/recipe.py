"""What to do: the recipe, the data it learns from, and how the result is measured.

Everything here is frozen pydantic: it validates what people write, and its canonical JSON is what a job's
identity is computed from. Two spellings of the same recipe have the same canonical JSON.
"""

from __future__ import annotations

import json
import operator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from compression.boundary import reason
from compression.errors import PlanError, Problem
from compression.hub.presets import PRESETS
from compression.hub.references import HubRef
from compression.methods import METHODS, any_step, makers, method_of, peer_names
from compression.peer_recipe import is_peer_recipe, peer_steps
from compression.s3.client import S3Ref
from compression.schemes import get_scheme, sparse_fields
from compression.steps import Frozen, PruningStep, QuantizingStep, SmoothingStep, Step

if TYPE_CHECKING:
    AnyStep = Step
else:
    AnyStep = any_step()


def _written_out(step: Any) -> list[Any]:
    """A step as people write it -> the steps it stands for.

    One that moves scales and has a scheme, such as AWQ, stands for itself, then round to nearest.
    """
    if not isinstance(step, dict) or not isinstance(step.get("type"), str):
        return [step]
    step = {**step, "type": peer_names().get(step["type"], step["type"])}
    method = METHODS.get(step["type"])
    if method is None or not method.tries_rounding or "scheme" not in step:
        return [step]
    fields = {"type", *method.step.model_fields}
    own = {key: value for key, value in step.items() if key in fields}
    rounding = {key: value for key, value in step.items() if key not in fields}
    return [own, {**rounding, "type": "rtn"}]


def _peer_steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises ValueError alone, in whole characters: pydantic lets other errors of a validator through as they
    are, and fails on a message that quotes half a character."""
    try:
        return peer_steps(document)
    except ValueError as error:
        raise ValueError(reason(error)) from error
    except (TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"the recipe cannot be read: {reason(error)}") from error


class Recipe(Frozen):
    """An ordered list of steps: at most one that smooths, then those that prune, then those that quantize.

    A linear is pruned by the first pruning step that targets it, and what is left of it is quantized by the
    first quantizing step that does. strict: a pattern in `ignore` that matches no module of the model is an
    error; otherwise it is a warning, as recipes serve several models.
    """

    steps: tuple[AnyStep, ...] = Field(min_length=1, max_length=16)
    strict: bool = Field(default=False, strict=True, exclude_if=operator.not_)

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            value = {"steps": value}
        elif isinstance(value, dict) and is_peer_recipe(value):
            strict = {"strict": value["strict"]} if "strict" in value else {}
            value = {"steps": _peer_steps(value), **strict}
        if isinstance(value, dict) and isinstance(value.get("steps"), list | tuple):
            return {**value, "steps": [part for step in value["steps"] for part in _written_out(step)]}
        return value

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        if not self.quantizing and not self.pruning:
            raise ValueError("a recipe needs a step that quantizes or prunes, such as gptq or sparsegpt")
        if any(isinstance(step, SmoothingStep) for step in self.steps[1:]):
            raise ValueError("smoothquant or awq is the first step, once, and not both")
        if method_of(self.steps[0]).tries_rounding and not self.quantizing:
            name = self.steps[0].type
            raise ValueError(f"{name} needs a scheme, or a step after it that quantizes, such as rtn or gptq")
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
        strict: bool = False,
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
        fitting, others = makers(sparse=sparse is not None), makers(sparse=sparse is None)
        if method in others:
            message = f"{method} does not make {scheme}."
            raise PlanError(
                Problem("method_does_not_fit", message, f"Use one of {', '.join(fitting)}.", "/method")
            )
        if sparse is not None:
            method = method or ("sparsegpt" if has_dataset else "magnitude")
            return cls.model_validate({"steps": [{"type": method, **sparse, **given}], "strict": strict})
        if method is None:
            weights = get_scheme(scheme).weights
            coarse = weights.type == "int" or weights.num_bits == 4
            method = "gptq" if coarse and has_dataset else "rtn"
        return cls.model_validate({"steps": [{"type": method, "scheme": scheme, **given}], "strict": strict})

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
    def methods(self) -> str:
        """What is done, in order: "gptq", "smoothquant+gptq"."""
        return "+".join(step.type for step in self.steps)

    @property
    def needs_data(self) -> bool:
        """Whether any step cannot be solved without calibration data."""
        return (
            self.kv_cache_step is not None
            or any(method_of(step).needs_data for step in self.steps)
            or any(
                step.observer in ("imatrix", "gram") or get_scheme(step.scheme).fixed_input
                for step in self.quantizing.values()
            )
        )

    def canonical_json(self) -> str:
        """Sorted keys, every default written out, no spaces: the same text for the same recipe."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


DATASET_SUFFIXES = (".jsonl", ".parquet", ".csv", ".txt")
"""Of files that text is read from."""


class DatasetSpec(Frozen):
    """Where calibration text comes from. Exactly one of `path`, `hub`, `s3`, `texts` and `generated`.

    path: a local .jsonl, .parquet, .csv or .txt file (one document a line of JSON or a row; a text file is
    split at blank lines). hub: the name of a preset (c4, open_platypus, ultrachat_200k, wikitext), or
    `owner/name`, or either with `@revision`; config and split: which part of it; by default what the preset
    says, else `train` of the only config. s3: such a file, as `s3://bucket/key`; version_id and etag: which
    state of it, by default the one that is first fetched. texts: the documents themselves. generated: the
    model writes them (generation.py); as a string, "self".

    text_column: the column that holds the text; by default the first there is of text, content, messages,
    prompt. messages_column: a column with chat messages, each with a role, to which the model's chat template
    is applied.
    """

    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    s3: str | None = None
    version_id: str | None = None
    etag: str | None = None
    texts: tuple[str, ...] | None = None
    generated: Literal[True] | None = None
    text_column: str | None = None
    messages_column: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        """A string is what it looks like: "self", an object in S3, a file, a name on the Hub; else a file."""
        if not isinstance(value, str):
            return value
        if value == "self":
            return {"generated": True}
        if value.startswith("s3://"):
            return {"s3": value}
        is_file = value.startswith(("/", ".", "~")) or value.lower().endswith(DATASET_SUFFIXES)
        return {"path" if is_file or not _is_on_hub(value) else "hub": value}

    @model_validator(mode="after")
    def _one_source(self) -> DatasetSpec:
        kinds = (self.path, self.hub, self.s3, self.texts, self.generated)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of path, hub, s3, texts and generated")
        if self.hub is None and (self.config is not None or self.split is not None):
            raise ValueError("config and split are parts of a dataset on the Hub: give hub")
        if self.hub is not None and not _is_on_hub(self.hub):
            raise ValueError(
                f"hub is owner/name or one of {', '.join(PRESETS)}, either with @revision or without"
            )
        if self.s3 is None and (self.version_id is not None or self.etag is not None):
            raise ValueError("version_id and etag are of an object in S3: give s3")
        if self.s3 is not None and S3Ref.parse(self.s3) is None:
            raise ValueError("s3 is s3://bucket/key, without empty parts, . or .. in the key")
        if self.generated and (self.text_column is not None or self.messages_column is not None):
            raise ValueError("text that the model writes has no columns")
        if self.text_column is not None and self.messages_column is not None:
            raise ValueError("give at most one of text_column and messages_column")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched first."""
        return self.hub is not None or self.s3 is not None


def _is_on_hub(text: str) -> bool:
    """Whether a text can be a dataset's name on the Hub."""
    return HubRef.parse(text) is not None or text.partition("@")[0] in PRESETS


class Calibration(Frozen):
    """How text becomes calibration samples.

    With packing, one sample is one block of max_seq_length tokens; without, one sample is one document,
    truncated to max_seq_length. seed: which documents are held out and in which order blocks are drawn.
    max_dropped_share: of the documents that are read, how many may be unusable: conversations that the chat
    template refuses, text that is no Unicode. They are dropped, counted and named; more are an error.
    """

    num_calibration_samples: int = Field(default=512, strict=True, ge=1, le=1_000_000)
    max_seq_length: int = Field(default=2048, strict=True, ge=2, le=1 << 20)
    packing: bool = Field(default=True, strict=True)
    seed: int = Field(default=0, strict=True, ge=0, lt=1 << 63)
    max_dropped_share: float = Field(default=0.05, strict=True, ge=0, le=1, allow_inf_nan=False)


class Evaluation(Frozen):
    """The side-by-side measurement on held-out text.

    num_samples: blocks of max_seq_length; by default 1/16 of the calibration samples, at least 2,048 tokens.
    """

    enabled: bool = Field(default=True, strict=True)
    num_samples: int | None = Field(default=None, strict=True, ge=1, le=1_000_000)

    def samples(self, calibration: Calibration) -> int:
        """How many held-out blocks this run uses; 0 when off."""
        if not self.enabled:
            return 0
        if self.num_samples is not None:
            return self.num_samples
        at_least = -(-2048 // calibration.max_seq_length)
        return max(at_least, calibration.num_calibration_samples // 16)
