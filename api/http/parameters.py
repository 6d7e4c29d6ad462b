"""Unknown query parameters are refused: with a mistyped filter, a list would have everything."""

from __future__ import annotations

from fastapi import Request
from fastapi.exceptions import RequestValidationError


def refuse_unknown(request: Request) -> None:
    """Raise a 422 that names the query parameters which the OpenAPI document does not have for this route."""
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
