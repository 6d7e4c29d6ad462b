"""Errors of the HTTP API, all of them RFC 9457 problem+json with a stable `code`.

ApiError            status, code, message, hint, problems
├── Unauthorized    401  missing_key, wrong_key
├── Forbidden       403  scope_missing
├── NotFound        404  job_not_found, batch_not_found, webhook_not_found, key_not_found, ...
├── Conflict        409  not_cancellable, not_retryable, not_deletable, last_admin_key, prefix_taken, ...
├── WrongMediaType  415  unsupported_media_type
├── BadRange        416  range_not_satisfiable
├── Unprocessable   422  everything that is wrong with a submission, all at once
├── TooManyRequests 429  quota_queued, rate_limited
└── Unavailable     503  schema_stale, schema_newer, store_unavailable, hub_unreachable, s3_unreachable, ...

http/problems.py answers these and some others: PlanError 422, StoreUnavailable 503 (store_denied,
store_unreachable), a database that is away 503 (database_unavailable).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.schemas import all_required
from compression.errors import Problem


class ApiError(Exception):
    """Base: what a route raises to answer with a problem."""

    status: ClassVar[int]

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        *,
        problems: Sequence[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.problems = problems
        self.headers = dict(headers or {})


class Unauthorized(ApiError):
    status = 401


class Forbidden(ApiError):
    status = 403


class NotFound(ApiError):
    status = 404


class Conflict(ApiError):
    status = 409


class WrongMediaType(ApiError):
    status = 415


class BadRange(ApiError):
    status = 416


class Unprocessable(ApiError):
    """A submission that cannot succeed; the first problem gives the answer's own code."""

    status = 422

    def __init__(self, *problems: Problem) -> None:
        first = problems[0]
        super().__init__(first.code, first.message, first.hint, problems=problems)

    @classmethod
    def of_fields(cls, error: ValidationError, body: Any, hint: str = "") -> Unprocessable:
        """What pydantic found wrong with the fields of that body."""
        refusal = Refusal.of_fields(error, body)
        refused = cls(*(Problem(each.code, each.message, hint, each.pointer) for each in refusal.errors))
        refused.code, refused.message = refusal.code, refusal.detail
        return refused


class TooManyRequests(ApiError):
    status = 429


class Unavailable(ApiError):
    status = 503


class FieldProblem(BaseModel):
    """One thing that is wrong. `pointer` (RFC 6901) is the field of the body to blame, where one is."""

    model_config = ConfigDict(json_schema_extra=all_required)

    code: str
    message: str
    hint: str = ""
    pointer: str = ""
    parameter: str = Field(default="", description="The query, path or header parameter to blame.")


class Refusal(BaseModel):
    """Why one of several things was refused: what an error would say of it alone."""

    model_config = ConfigDict(json_schema_extra=all_required)

    code: str = Field(examples=["unknown_scheme"])
    detail: str = Field(examples=["There is no scheme named 'W5A16'."])
    hint: str = Field(default="", examples=["Use one of W4A16, W8A8, FP8_DYNAMIC."])
    errors: list[FieldProblem] = Field(default=[], description="Pointers begin at what was refused.")

    @classmethod
    def of(cls, error: ApiError) -> Refusal:
        """What that error says."""
        errors = [field_problem(problem) for problem in error.problems]
        return cls(code=error.code, detail=error.message, hint=error.hint, errors=errors)

    @classmethod
    def of_fields(cls, error: ValidationError, body: Any) -> Refusal:
        """What is wrong with the fields of that body."""
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        return invalid_fields(details, body)


class ProblemDetails(BaseModel):
    """An error (RFC 9457). Programs branch on `code`, which is never renamed."""

    model_config = ConfigDict(json_schema_extra=all_required)

    type: str = "about:blank"
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    code: str = Field(examples=["unknown_scheme"])
    detail: str = Field(examples=["There is no scheme named 'W5A16'."])
    hint: str = Field(default="", examples=["Use one of W4A16, W8A8, FP8_DYNAMIC."])
    request_id: str = ""
    errors: list[FieldProblem] = []


def field_problem(problem: Problem) -> FieldProblem:
    """As an answer has it."""
    return FieldProblem(
        code=problem.code, message=problem.message, hint=problem.hint, pointer=problem.pointer
    )


def invalid_fields(details: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """What pydantic found wrong with that body, which `loc` begins with, or with a parameter."""
    errors = [_invalid_field(detail, body) for detail in details]
    own = [errors[index] for index, detail in enumerate(details) if "code" in detail.get("ctx", {})]
    first = (own or errors)[0]
    code = first.code if own else "validation_error"
    where = first.pointer or first.parameter
    return Refusal(code=code, detail=f"{where}: {first.message}" if where else first.message, errors=errors)


def _invalid_field(detail: Mapping[str, Any], body: Any) -> FieldProblem:
    place, *path = detail["loc"]
    code = detail.get("ctx", {}).get("code", detail["type"])
    message = detail["msg"].removeprefix("Value error, ")
    if place != "body":
        return FieldProblem(code=code, message=message, parameter=".".join(map(str, path)))
    return FieldProblem(code=code, message=message, pointer=pointer_to(path, body, detail["type"]))


def pointer_to(path: Sequence[str | int], body: Any, error_type: str) -> str:
    """JSON pointer of pydantic's location: what names no place in the body (a union's tag) is left out."""
    pointer = ""
    for index, part in enumerate(path):
        inside = isinstance(body, dict) and part in body
        inside = inside or (isinstance(body, list) and isinstance(part, int) and part < len(body))
        is_missing = error_type == "missing" and index == len(path) - 1
        if inside or is_missing:
            pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
        if inside:
            body = body[part]
    return pointer
