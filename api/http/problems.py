"""How errors are answered: problem+json (RFC 9457) for those of api/errors.py, and for some others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.database import AWAY, reason
from api.errors import ApiError, FieldProblem, ProblemDetails, Refusal, Unprocessable, invalid_fields
from api.store.base import StoreUnavailable
from compression.errors import PlanError

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


def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        return problem_response(400, "invalid_json", "The body is not JSON.", str(details[0]["ctx"]["error"]))
    if details[0]["type"] == "model_attributes_type" and details[0]["loc"] == ("body",):
        hint = "Send the header `Content-Type: application/json`."
        return problem_response(422, "not_a_json_object", "The body is not a JSON object.", hint)
    said = invalid_fields(details, error.body)
    return problem_response(422, said.code, said.detail, errors=said.errors)


def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return problem_response(error.status_code, code, str(error.detail), headers=headers)


def _methods(request: Request) -> set[str]:
    """All methods of the path; each may be in another route."""
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
