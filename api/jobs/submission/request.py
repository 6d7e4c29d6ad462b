"""What a submission may say."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from api.jobs.ledger.models import DeviceClass
from api.jobs.ledger.views import QualityGate
from api.projects.schemas import S3Prefix
from compression.errors import PlanError
from compression.planning.planner import Require
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.schemes import Observer
from compression.steps import GroupSize

_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
_TEN_YEARS = 10 * 365 * 86_400


def _label_key(key: str) -> str:
    """A filter is key:value, and values may have colons."""
    if ":" in key or not re.fullmatch(_PRINTABLE, key):
        message = "The key of a label has no colon and no control character: ?label=key:value finds it."
        context = {"code": "label_key_invalid", "message": message}
        raise PydanticCustomError("label_key_invalid", "{message}", context)
    return key


LabelKey = Annotated[str, Field(min_length=1, max_length=63), AfterValidator(_label_key)]
LabelValue = Annotated[str, Field(max_length=256, pattern=_PRINTABLE)]
Labels = Annotated[
    dict[LabelKey, LabelValue],
    Field(max_length=32, description="Keys without colons. Jobs are listed by them: `?label=key:value`."),
]
Name = Annotated[str, Field(max_length=200, pattern=_PRINTABLE)]
Seconds = Annotated[int, Field(strict=True, ge=1, le=_TEN_YEARS)]
ShortForm = Literal["scheme", "method", "observer", "group_size", "targets", "ignore", "strict"]
"""Fields of a submission that a recipe stands for."""


class Resources(BaseModel):
    """What the job may run on."""

    model_config = ConfigDict(extra="forbid")

    device_class: DeviceClass = "any"


def _accept_string_dataset(schema: dict[str, Any]) -> None:
    """A dataset may be a string, of which `DatasetSpec` says what it means."""
    schema["properties"]["dataset"]["anyOf"].insert(0, {"type": "string"})


class JobSubmit(BaseModel):
    """One compression to run: what, with which data, how.

    Give either `scheme`, with `method`, `observer`, `group_size`, `targets`, `ignore` and `strict` where the
    defaults do not fit, or a whole `recipe`. The default method is gptq for int and fp4 weights with a
    dataset, else rtn; for a sparse scheme sparsegpt with a dataset, else magnitude.
    """

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra=_accept_string_dataset,
    )

    model: str = Field(
        min_length=1,
        max_length=4096,
        description="A folder below one of the server's local roots, owner/name[@revision] on the Hub, or "
        "s3://bucket/folder below one of the project's prefixes.",
    )
    dataset: DatasetSpec | None = Field(default=None, description="Calibration text.")
    scheme: str | None = Field(default=None, max_length=100)
    method: str | None = Field(default=None, max_length=100)
    observer: Observer | None = None
    group_size: GroupSize | None = None
    targets: list[str] | str | None = None
    ignore: list[str] | str | None = None
    strict: bool | None = Field(
        default=None,
        strict=True,
        description="Whether a pattern in `ignore` that matches no module is an error, not a warning. With a "
        "`recipe` it is a field of that.",
    )
    recipe: Recipe | None = None
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    quality_gate: QualityGate | None = None
    require: Require | None = Field(
        default=None,
        description="Refuse what vLLM has no kernels for, what Transformers does not load, or either.",
    )
    resources: Resources = Resources()
    priority: int = Field(default=0, strict=True, ge=-100, le=100, description="Higher goes first.")
    name: Name | None = None
    labels: Labels = {}
    max_runtime_seconds: Seconds | None = None
    max_queue_seconds: Seconds | None = None
    cache: Literal["use", "bypass"] = Field(
        default="use",
        description="use: have the result of another job of the project that does the same.",
    )
    callback: str | None = Field(
        default=None,
        max_length=40,
        description="A webhook that gets messages about this job, also if it gets none about others.",
        examples=["wh_0f3c9a1be27d45608c1f"],
    )
    output: S3Prefix | None = Field(
        default=None,
        description="Where the files are copied to: a bucket, or a folder of one, that the project may "
        "write to. They lie in a folder of the job's there, which its artifacts name.",
        examples=["s3://models/search"],
    )

    @field_validator("recipe", mode="wrap")
    @classmethod
    def _keep_the_code(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except PlanError as error:
            context = {"code": error.code, "message": str(error)}
            raise PydanticCustomError("plan_error", "{message}", context) from error


def _without_defaults(schema: dict[str, Any]) -> None:
    """What is not given is as in the other job; a client must not send the defaults of a submission."""
    _accept_string_dataset(schema)
    for field in schema["properties"].values():
        field.pop("default", None)


class JobOverrides(JobSubmit):
    """What is to be different in a clone: any field of a submission. `scheme` and what goes with it, or a
    `recipe`, replace the whole recipe."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    model: str = Field(default="", min_length=1, max_length=4096)


SUBMIT_EXAMPLES: dict[str, Any] = {
    "smallest": {
        "summary": "The smallest body",
        "value": {"model": "/models/llama", "dataset": "/data/texts.jsonl", "scheme": "W4A16"},
    },
    "recipe": {
        "summary": "A whole recipe",
        "value": {
            "model": "/models/llama",
            "dataset": {"path": "/data/texts.jsonl", "text_column": "text"},
            "recipe": {"steps": [{"type": "gptq", "scheme": "W4A16", "group_size": 64}]},
            "calibration": {"num_calibration_samples": 128, "max_seq_length": 1024},
            "quality_gate": {"max_perplexity_ratio": 1.1},
        },
    },
}
