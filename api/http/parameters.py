"""A parameter that a route does not have is refused: a mistyped filter would otherwise find everything."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError


def refuse_unknown(request: Request) -> None:
    """Of a route below /v1: a 422 that names what is not among the query's parameters in the document."""
    if not request.query_params:
        return
    item = request.app.openapi()["paths"][request.scope["route"].path_format]
    operation = item["get" if request.method == "HEAD" else request.method.lower()]
    known = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"}
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        message = "There is no such parameter."
        raise RequestValidationError(
            [{"type": "unknown_parameter", "loc": ("query", name), "msg": message} for name in unknown]
        )
