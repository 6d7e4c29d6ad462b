"""The application class: its OpenAPI document tells errors under the media type that they really have."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from api.errors import MEDIA_TYPE


class ProblemAPI(FastAPI):
    """A FastAPI whose errors are all problem+json."""

    def openapi(self) -> dict[str, Any]:
        """The document, made at the first call."""
        if self.openapi_schema is None:
            spec = super().openapi()
            for path in spec["paths"].values():
                for operation in path.values():
                    _use_problem_type(operation["responses"])
        assert self.openapi_schema is not None
        return self.openapi_schema


def _use_problem_type(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        if int(status) >= 400:
            response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
