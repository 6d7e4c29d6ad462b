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

Of other kinds, answered all the same: PlanError 422, StoreUnavailable 503 (store_denied, store_unreachable),
a database that is away 503 (database_unavailable).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.artifacts.store import StoreUnavailable
from api.database import AWAY, reason
from api.schemas import all_required
from compression.errors import PlanError, Problem

MEDIA_TYPE = "application/problem+json"
INTERNAL_MESSAGE = "The server failed on this request; its log has the reason under the request's id."
_RETRY_SECONDS = "5"
_HTTP_CODES = {
    400: "bad_request",
    404: "route_not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}

log = structlog.get_logger(__name__)


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
        errors = [_field_problem(problem) for problem in error.problems]
        return cls(code=error.code, detail=error.message, hint=error.hint, errors=errors)

    @classmethod
    def of_fields(cls, error: ValidationError, body: Any) -> Refusal:
        """What is wrong with the fields of that body."""
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()]
        return _invalid_fields(details, body)


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


def problem_response(
    status: int,
    code: str,
    detail: str,
    hint: str = "",
    *,
    errors: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer for an error."""
    body = ProblemDetails(
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        hint=hint,
        request_id=structlog.contextvars.get_contextvars().get("request_id", ""),
        errors=list(errors),
    )
    return JSONResponse(body.model_dump(), status, dict(headers or {}), MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of this app with a problem."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(PlanError, _on_plan_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    for kind in AWAY:
        app.add_exception_handler(kind, _on_database_error)
    app.add_exception_handler(DataError, _on_impossible_value)
    app.add_exception_handler(StoreUnavailable, _on_store_error)


def _on_api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    said = Refusal.of(error)
    return problem_response(
        error.status, said.code, said.detail, said.hint, errors=said.errors, headers=error.headers
    )


def _on_plan_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PlanError)
    return _on_api_error(request, Unprocessable(*error.problems))


def _field_problem(problem: Problem) -> FieldProblem:
    return FieldProblem(
        code=problem.code, message=problem.message, hint=problem.hint, pointer=problem.pointer
    )


def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        return problem_response(400, "invalid_json", "The body is not JSON.", str(details[0]["ctx"]["error"]))
    if details[0]["type"] == "model_attributes_type" and details[0]["loc"] == ("body",):
        hint = "Send the header `Content-Type: application/json`."
        return problem_response(422, "not_a_json_object", "The body is not a JSON object.", hint)
    said = _invalid_fields(details, error.body)
    return problem_response(422, said.code, said.detail, errors=said.errors)


def _invalid_fields(details: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
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


def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return problem_response(error.status_code, code, str(error.detail), headers=headers)


def _methods(request: Request) -> set[str]:
    """All methods of the path, of which each may have a route of its own."""
    tried = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    return {
        method
        for method in tried
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] == Match.FULL
    }


def _on_database_error(_request: Request, error: Exception) -> JSONResponse:
    log.error("database_unavailable", error=reason(error))
    return problem_response(
        503,
        "database_unavailable",
        "The database did not answer in time.",
        "Try again.",
        headers={"Retry-After": _RETRY_SECONDS},
    )


def _on_impossible_value(_request: Request, error: Exception) -> JSONResponse:
    """PostgreSQL has no text with NUL in it, wherever in a request it comes from."""
    assert isinstance(error, DataError)
    log.info("value_not_storable", error=str(error.orig))
    message = "A value of this request is none that the database can hold, or look for."
    return problem_response(422, "value_not_storable", message, "Leave out the character U+0000.")


def _on_store_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StoreUnavailable)
    log.error("store_unavailable", code=error.code, error=error.message)
    headers = {"Retry-After": _RETRY_SECONDS}
    return problem_response(503, error.code, error.message, error.hint, headers=headers)
