"""What the batches routes take and answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from api.errors import Refusal, Unprocessable
from api.jobs.ledger.models import Batch, JobStatus
from api.jobs.schemas import JobOutline
from api.jobs.submission.request import JobSubmit, Labels, Name, ShortForm
from api.schemas import all_required
from compression.errors import Problem

MAX_ITEMS = 1000


def _read_item(value: Any) -> JobSubmit | Refusal:
    """A job, or why it is none: an item that is wrong leaves the others as they are."""
    if isinstance(value, Refusal):
        return value
    if not isinstance(value, dict):
        hint = "Give the fields of a submission."
        return Refusal(code="not_a_json_object", detail="The job is not a JSON object.", hint=hint)
    try:
        return JobSubmit.model_validate(value)
    except ValidationError as error:
        return Refusal.of_fields(error, value)


def check_count(count: int) -> None:
    """Raises Unprocessable, which is answered as it is: of what is too large, not all has to be read."""
    if count == 0:
        hint = "Give at least one job, or a model and a scheme of a sweep."
        raise Unprocessable(Problem("batch_empty", "The batch has no jobs.", hint))
    if count > MAX_ITEMS:
        hint = "Submit the rest as another batch."
        raise Unprocessable(Problem("batch_too_large", f"A batch has at most {MAX_ITEMS} jobs.", hint))


def _counted(jobs: Any) -> Any:
    if isinstance(jobs, list):
        check_count(len(jobs))
    return jobs


Item = Annotated[JobSubmit | Refusal, PlainValidator(_read_item, json_schema_input_type=JobSubmit)]


class Sweep(BaseModel):
    """Every model with every scheme, the first model's first."""

    model_config = ConfigDict(extra="forbid")

    models: list[str]
    schemes: list[str | dict[ShortForm, Any]] = Field(
        description="A scheme, or it with method, observer, group_size, targets, ignore or strict.",
        examples=[["W8A8", {"scheme": "W4A16", "method": "awq"}]],
    )
    base: dict[str, Any] = Field(
        default={}, description="The other fields of every job. What a scheme says goes before it."
    )

    @model_validator(mode="after")
    def _can_be_made(self) -> Self:
        check_count(len(self.models) * len(self.schemes))
        for name in ("model", "scheme"):
            if name in self.base:
                problem = Problem(
                    "sweep_base_overlaps",
                    f"The base has a {name}, which the sweep gives to each job.",
                    f"Name it under {name}s alone.",
                    f"/sweep/base/{name}",
                )
                raise Unprocessable(problem)
        return self

    def items(self) -> Iterator[JobSubmit | Refusal]:
        """The jobs that it stands for."""
        for model in self.models:
            for scheme in self.schemes:
                of_scheme = {"scheme": scheme} if isinstance(scheme, str) else scheme
                yield _read_item({**self.base, "model": model, **of_scheme})


class BatchSubmit(BaseModel):
    """Up to 1,000 jobs, of which each is accepted or refused on its own: either `jobs` or a `sweep`."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    labels: Labels = {}
    jobs: Annotated[list[Item], BeforeValidator(_counted)] | None = None
    sweep: Sweep | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_lines(cls, value: Any) -> Any:
        """The server hands over a body that is not JSON as bytes."""
        return {"jobs": _read_lines(value)} if isinstance(value, bytes) else value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.jobs is None) == (self.sweep is None):
            said = "neither jobs nor a sweep" if self.jobs is None else "jobs and a sweep"
            message = f"The body has {said}."
            raise Unprocessable(Problem("jobs_or_sweep", message, "Give one of them."))
        return self

    def items(self) -> list[JobSubmit | Refusal]:
        """What becomes the batch's items, in order."""
        if self.sweep is not None:
            return list(self.sweep.items())
        assert self.jobs is not None
        return self.jobs


def _read_lines(content: bytes) -> list[Any]:
    """JSON Lines. What is not JSON is refused by itself; of too many lines, not all are read."""
    lines = (line for line in io.BytesIO(content) if line.strip())
    return [_read_line(line) for line in islice(lines, MAX_ITEMS + 1)]


def _read_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Refusal(code="invalid_json", detail="The line is not JSON.", hint=str(error))


class BatchCounts(BaseModel):
    """Items by what became of them. total is accepted + refused; accepted is the sum of all that follow."""

    model_config = ConfigDict(json_schema_extra=all_required)

    total: int
    accepted: int
    refused: int
    queued: int = 0
    running: int = 0
    cancelling: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    deleted: int = Field(description="Jobs that were deleted since.")

    @classmethod
    def of(cls, batch: Batch, by_status: Mapping[JobStatus, int]) -> Self:
        """From the row, and how many of its jobs there are."""
        return cls(
            total=batch.accepted + batch.refused,
            accepted=batch.accepted,
            refused=batch.refused,
            deleted=batch.accepted - sum(by_status.values()),
            **{status.value: count for status, count in by_status.items()},
        )


class BatchRead(BaseModel):
    """A batch as it stands."""

    id: str = Field(examples=["batch_06dk2m8x0c4q7tz9h3v5n1w8er"])
    name: str | None
    labels: dict[str, str]
    created_at: datetime
    counts: BatchCounts


class AcceptedItem(BaseModel):
    """An item that became a job. index: where it was in the batch, from 0."""

    index: int
    job_id: str


class RefusedItem(BaseModel):
    """An item that became none, and why."""

    index: int
    error: Refusal


class BatchDetail(BatchRead):
    """A batch and its items by their index, without those whose job was deleted. `next_cursor` is null on the
    last page."""

    items: list[AcceptedItem | RefusedItem]
    next_cursor: int | None


class BatchPage(BaseModel):
    """Batches, the newest first. `next_cursor` is null on the last page."""

    items: list[BatchRead]
    next_cursor: str | None


class PlannedItem(JobOutline):
    """An item that would become a job."""

    index: int


class BatchPlanned(BaseModel):
    """What a batch would become: nothing is stored."""

    total: int
    accepted: int
    refused: int
    items: list[PlannedItem | RefusedItem]


BATCH_EXAMPLES: dict[str, Any] = {
    "sweep": {
        "summary": "Two models in three ways",
        "value": {
            "name": "first look",
            "sweep": {
                "models": ["/models/llama", "org/model"],
                "schemes": ["W8A8", "FP8_DYNAMIC", {"scheme": "W4A16", "method": "awq"}],
                "base": {"dataset": "/data/texts.jsonl"},
            },
        },
    },
    "jobs": {
        "summary": "Jobs one by one",
        "value": {
            "jobs": [
                {"model": "/models/llama", "dataset": "/data/texts.jsonl", "scheme": "W4A16"},
                {"model": "/models/llama", "scheme": "FP8_DYNAMIC", "priority": 5},
            ]
        },
    },
}
