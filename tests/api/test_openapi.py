"""The specification is one that client generators like."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from api.batches.schemas import BATCH_EXAMPLES, BatchSubmit
from api.document import openapi_text
from api.errors import ApiError, Unprocessable
from api.http.examples import EXAMPLES
from api.jobs.submission.request import SUBMIT_EXAMPLES, JobOverrides, JobSubmit
from api.projects.schemas import KeyCreate
from api.typed import types_text
from api.webhooks.schemas import WebhookCreate
from tests.api.conftest import Server

ROOT = Path(__file__).parents[2]


def operations(server: Server) -> list[tuple[str, str, dict[str, Any]]]:
    spec = server.http.get("/openapi.json").json()
    return [
        (method, path, operation)
        for path, item in spec["paths"].items()
        for method, operation in item.items()
    ]


def test_the_committed_document_is_this_version_s() -> None:
    committed = (ROOT / "docs" / "openapi.json").read_text()
    assert openapi_text() == committed, "run `python -m api.document > docs/openapi.json`"


def test_no_parameter_can_be_null(server: Server) -> None:
    for method, path, operation in operations(server):
        for parameter in operation.get("parameters", ()):
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), (method, path, parameter)


def test_operation_ids_are_the_names_of_the_functions(server: Server) -> None:
    """Unique, in snake_case, and what a person wrote: no part of a path or a method."""
    ids = [operation["operationId"] for _, _, operation in operations(server)]
    assert sorted(ids) == sorted(set(ids))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in ids)
    app = server.http.app
    assert isinstance(app, FastAPI)
    routes = [each for each in iter_route_contexts(app.routes) if each.include_in_schema]
    assert sorted(ids) == sorted(each.endpoint.__name__ for each in routes if "HEAD" not in each.methods)
    assert {"submit_job", "list_jobs", "get_job", "cancel_job", "retry_job", "download_artifact"} <= set(ids)


def test_every_operation_is_described_tagged_and_typed(server: Server) -> None:
    for method, path, operation in operations(server):
        assert operation["summary"], (method, path)
        assert operation["description"], (method, path)
        assert len(operation["tags"]) == 1, (method, path)
        if path.startswith("/v1/"):
            assert operation["security"] == [{"HTTPBearer": []}]
            assert {"401", "403", "429", "503"} <= set(operation["responses"])


def errors_of(operation: dict[str, Any]) -> dict[int, set[str]]:
    """The codes that the document tells of an operation, by status."""
    return {
        int(status): set(re.findall(r"`(\w+)`", response["description"]))
        for status, response in operation["responses"].items()
        if int(status) >= 400
    }


def test_every_error_is_a_problem_with_its_codes(server: Server) -> None:
    for method, path, operation in operations(server):
        for status, codes in errors_of(operation).items():
            response = operation["responses"][str(status)]
            ((media_type, media),) = response["content"].items()
            assert media_type == "application/problem+json"
            assert media["schema"] == {"$ref": "#/components/schemas/ProblemDetails"}
            assert media["example"]["code"] in codes, (method, path, status)


RAISED = {kind.__name__: kind.status for kind in ApiError.__subclasses__() if kind is not Unprocessable} | {
    "Problem": 422,
    "PydanticCustomError": 422,
}
NOT_OVER_HTTP = {"project_exists", "project_not_found", "prefix_taken", "broker_unavailable"}
"""Of the operator's commands, and what readiness only warns of."""


def test_every_code_that_the_api_raises_is_told(server: Server) -> None:
    told = {
        (status, code)
        for _, _, operation in operations(server)
        for status, codes in errors_of(operation).items()
        for code in codes
    }
    raised = {
        (RAISED[call.func.id], call.args[0].value)
        for file in (ROOT / "api").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in RAISED
        if call.args and isinstance(call.args[0], ast.Constant)
    }
    assert len(raised) > 40
    assert {each for each in raised - told if each[1] not in NOT_OVER_HTTP} == {(422, "plan_error")}


def media_of(operation: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every body and answer that is no file."""
    for part in (operation.get("requestBody", {}), *operation["responses"].values()):
        for kind, media in part.get("content", {}).items():
            if kind != "application/octet-stream":
                yield kind, media


def test_every_body_and_answer_has_an_example_that_is_one(server: Server) -> None:
    components = server.http.get("/openapi.json").json()["components"]
    for method, path, operation in operations(server):
        for kind, media in media_of(operation):
            shown = [each["value"] for each in media.get("examples", {}).values()] or [media["example"]]
            validator = jsonschema_rs.validator_for({**media["schema"], "components": components})
            for example in shown:
                assert not list(validator.iter_errors(example)), (method, path, kind)
                if kind == "application/json" and isinstance(example, dict):
                    assert example, (method, path)


def test_examples_of_bodies_are_taken() -> None:
    """What a schema cannot say holds too: that these fields go together."""
    for model in (JobOverrides, KeyCreate, WebhookCreate):
        model.model_validate(EXAMPLES[model.__name__])
    for jobs in SUBMIT_EXAMPLES.values():
        JobSubmit.model_validate(jobs["value"])
    for batches in BATCH_EXAMPLES.values():
        BatchSubmit.model_validate(batches["value"])


def test_nothing_that_generators_choke_on(server: Server) -> None:
    spec = server.http.get("/openapi.json").json()
    assert not [name for name in spec["components"]["schemas"] if not name.isidentifier()]
    assert not set(re.findall(r'"(allOf|not|prefixItems|patternProperties)":', json.dumps(spec)))
    overrides = spec["components"]["schemas"]["JobOverrides"]["properties"]
    assert not [name for name, field in overrides.items() if "default" in field]


def test_the_types_of_the_client_are_this_version_s() -> None:
    committed = (ROOT / "api" / "client" / "types.py").read_text()
    assert types_text() == committed, "run `python -m api.typed > api/client/types.py`"


def test_the_smallest_body_is_an_example(server: Server) -> None:
    spec = server.http.get("/openapi.json").json()
    examples = spec["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples["smallest"]["value"]) == {"model", "dataset", "scheme"}
    dataset = spec["components"]["schemas"]["JobSubmit"]["properties"]["dataset"]
    assert {"type": "string"} in dataset["anyOf"]
