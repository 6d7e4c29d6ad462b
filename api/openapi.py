"""The application class, whose OpenAPI document is one that generators of clients can use as it is."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.errors import MEDIA_TYPE


class ProblemAPI(FastAPI):
    """A FastAPI whose errors are all problem+json, and whose parameters are left out where there are none."""

    def openapi(self) -> dict[str, Any]:
        """The document, made at the first call."""
        if self.openapi_schema is None:
            spec = super().openapi()
            for path in spec["paths"].values():
                for operation in path.values():
                    _use_problem_type(operation["responses"])
                    for parameter in operation.get("parameters", ()):
                        _leave_out_null(parameter["schema"])
        assert self.openapi_schema is not None
        return self.openapi_schema


def _use_problem_type(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        if int(status) >= 400:
            response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}


def _leave_out_null(schema: dict[str, Any]) -> None:
    """Neither a query nor a header can say null: what is optional is not sent."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema |= kinds[0]
