"""The application class, with an OpenAPI document that client generators can use unchanged."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.http.examples import EXAMPLES
from api.http.problems import MEDIA_TYPE


class ProblemAPI(FastAPI):
    """A FastAPI whose errors are all problem+json, whose parameters are left out where there are none, and
    whose bodies and answers have examples."""

    def openapi(self) -> dict[str, Any]:
        """The document, made at the first call."""
        if self.openapi_schema is None:
            spec = super().openapi()
            for path in spec["paths"].values():
                for operation in path.values():
                    _complete(operation)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _complete(operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        _leave_out_null(parameter["schema"])
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
        elif "application/json" in response.get("content", {}):
            _show(response["content"]["application/json"], operation["operationId"])
    if "requestBody" in operation:
        _show(operation["requestBody"]["content"]["application/json"], operation["operationId"])


def _show(media: dict[str, Any], operation_id: str) -> None:
    """Add the example of a schema; of one without a name, that of the operation."""
    if "examples" not in media:
        name = media["schema"].get("$ref", operation_id).rpartition("/")[2]
        media["example"] = EXAMPLES[name]


def _leave_out_null(schema: dict[str, Any]) -> None:
    """Remove null from a parameter's types: a query or header cannot be null, only left out."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema |= kinds[0]
