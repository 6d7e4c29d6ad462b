"""What the jobs routes take and answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError
from sqlalchemy import inspect

from api.database import Columns
from api.jobs.models import AttemptOutcome, Job, JobStatus
from api.projects.schemas import S3Prefix
from compression.errors import PlanError
from compression.planning.planner import Require
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.steps import GroupSize, Observer

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
DeviceClass = Literal["any", "cpu", "cuda"]
ShortForm = Literal["scheme", "method", "observer", "group_size", "targets", "ignore"]
"""Fields of a submission that a recipe stands for."""


class QualityGate(BaseModel):
    """A job whose compressed model is worse than this fails, with its report and without artifacts."""

    model_config = ConfigDict(extra="forbid")

    max_perplexity_ratio: float = Field(strict=True, gt=0, allow_inf_nan=False, examples=[1.05])


class Resources(BaseModel):
    """What the job may run on."""

    model_config = ConfigDict(extra="forbid")

    device_class: DeviceClass = "any"


def _accept_string_dataset(schema: dict[str, Any]) -> None:
    """A dataset may be a string, of which `DatasetSpec` says what it means."""
    schema["properties"]["dataset"]["anyOf"].insert(0, {"type": "string"})


class JobSubmit(BaseModel):
    """One compression to run: what, with which data, how.

    Give either `scheme`, with `method`, `observer`, `group_size`, `targets` and `ignore` where the defaults
    do not fit, or a whole `recipe`. The default method is gptq for int and fp4 weights with a dataset, else
    rtn; for a sparse scheme sparsegpt with a dataset, else magnitude.
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
        description="A webhook that is told of this job, also if it is not told of all.",
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


class AttemptRead(BaseModel):
    """One try of a worker. `outcome` is null while it runs; preempted attempts do not count."""

    number: int
    worker_id: str
    device_class: str
    started_at: datetime
    ended_at: datetime | None
    seconds: float | None
    outcome: AttemptOutcome | None
    error_code: str | None
    error_message: str | None
    exit_signal: int | None
    peak_host_bytes: int | None
    peak_gpu_bytes: int | None


class JobError(BaseModel):
    """Why a job failed or expired."""

    code: str
    message: str


class JobBatch(BaseModel):
    """Which item of which batch a job was submitted as; `index` counts from 0."""

    id: str
    index: int


Stored = TypeVar("Stored", Recipe, Calibration, Evaluation)
AsStored = Annotated[Stored, WrapValidator(lambda stored, _: stored), SerializeAsAny()]
"""The database has the JSON of such a model: it is not read into one to be written as JSON again."""


class JobRead(BaseModel):
    """A job as it stands."""

    id: str = Field(examples=["job_06dk2m8x0c4q7tz9h3v5n1w8er"])
    name: str | None
    labels: dict[str, str]
    priority: int
    status: JobStatus
    phase: str | None
    layers_done: int
    layers_total: int
    model: str
    dataset: str | None = Field(description="Where the dataset is, or how many inline texts it has.")
    scheme: str
    method: str
    recipe: AsStored[Recipe]
    calibration: AsStored[Calibration]
    evaluation: AsStored[Evaluation]
    quality_gate: QualityGate | None
    device_class: DeviceClass
    max_runtime_seconds: int | None
    max_queue_seconds: int | None
    callback: str | None = Field(description="The webhook that is told of this job.")
    output: str | None = Field(description="Below which prefix in S3 its files are copied to.")
    attempts_made: int
    event_seq: int = Field(description="The seq of its last event; it grows with every change.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: JobError | None
    batch: JobBatch | None
    deduplicated_from: str | None = Field(
        description="The job whose result this one has or, while it is queued, waits for."
    )

    @classmethod
    def of(cls, job: Job | Columns, **more: Any) -> Self:
        """From the row, and what is shown beside it."""
        same = {name: getattr(job, name) for name in _SAME}
        error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
        batch = None
        if job.batch_id is not None and job.batch_index is not None:
            batch = JobBatch(id=job.batch_id, index=job.batch_index)
        made = {"dataset": job.dataset_label, "error": error, "batch": batch}
        return cls.model_validate({**same, **made, **more})


_SAME = JobRead.model_fields.keys() & set(inspect(Job).columns.keys()) - {"dataset"}
"""Fields that are columns."""
SHOWN = _SAME | {"dataset_label", "error_code", "error_message", "batch_id", "batch_index"}
"""The columns that it is made of."""


class JobOutline(BaseModel):
    """What a submission would become, in short."""

    model: str
    scheme: str
    method: str
    layers_total: int
    device_class: DeviceClass


class JobPlanned(JobOutline):
    """What a submission would become: nothing is stored, no job exists."""

    plan: dict[str, Any] = Field(
        description="What would be done: every module's treatment, memory, disk, warnings."
    )


class Obstacle(BaseModel):
    """What keeps a job waiting. code: no_worker or unschedulable until another worker comes, quota_running
    until another job of the project has ended, attached until the one in `deduplicated_from` has,
    store_denied or store_unreachable until it is tried again."""

    code: Literal[
        "no_worker", "unschedulable", "quota_running", "attached", "store_denied", "store_unreachable"
    ]
    message: str


class JobProgress(JobRead):
    """A job with its attempts."""

    obstacle: Obstacle | None = Field(description="Why no worker that is alive takes it while it is queued.")
    attempts: list[AttemptRead]

    @classmethod
    def of_whole(cls, rows: Sequence[Columns], obstacle: Obstacle | None) -> Self:
        """From a row for each attempt, or one without."""
        made = rows if rows[0].attempts_made else ()
        names = {name: f"attempt_{name}" for name in AttemptRead.model_fields}
        attempts = [{name: getattr(row, column) for name, column in names.items()} for row in made]
        return cls.of(rows[0], obstacle=obstacle, attempts=attempts)


class JobDetail(JobProgress):
    """A job with its attempts and its plan."""

    plan: dict[str, Any] = Field(
        description="What was decided at submission: every module's treatment, memory, disk, warnings. "
        "The same whatever the seed."
    )


class JobPage(BaseModel):
    """Jobs, the newest first. `next_cursor` is null on the last page."""

    items: list[JobRead]
    next_cursor: str | None


class EventRead(BaseModel):
    """Something that happened. seq counts from 1 without a gap."""

    model_config = ConfigDict(from_attributes=True)

    seq: int
    at: datetime
    attempt: int | None
    type: str = Field(examples=["layer_solved"])
    data: dict[str, Any]


class EventPage(BaseModel):
    """Events after `since`, in order. Ask again with since = next_since until the status is a last one."""

    items: list[EventRead]
    next_since: int
    status: JobStatus


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
