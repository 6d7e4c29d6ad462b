"""The specification is one that client generators like."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from api.document import openapi_text
from tests.api.conftest import Server


def operations(server: Server) -> list[tuple[str, str, dict[str, Any]]]:
    spec = server.http.get("/openapi.json").json()
    return [
        (method, path, operation)
        for path, item in spec["paths"].items()
        for method, operation in item.items()
    ]


def test_the_committed_document_is_this_version_s() -> None:
    committed = (Path(__file__).parents[2] / "docs" / "openapi.json").read_text()
    assert openapi_text() == committed, "run `python -m api.document > docs/openapi.json`"


def test_no_parameter_can_be_null(server: Server) -> None:
    for method, path, operation in operations(server):
        for parameter in operation.get("parameters", ()):
            assert {"type": "null"} not in parameter["schema"].get("anyOf", ()), (method, path, parameter)


def test_operation_ids_are_the_names_of_the_functions(server: Server) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(server)]
    assert sorted(ids) == sorted(set(ids))
    assert all(re.fullmatch(r"[a-z_]+", name) for name in ids)
    assert {"submit_job", "list_jobs", "get_job", "cancel_job", "retry_job", "download_artifact"} <= set(ids)


def test_every_operation_is_described_tagged_and_typed(server: Server) -> None:
    for method, path, operation in operations(server):
        assert operation["description"], (method, path)
        assert len(operation["tags"]) == 1, (method, path)
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (method, path, status)
        if path.startswith("/v1/"):
            assert operation["security"] == [{"HTTPBearer": []}]
            assert {"401", "403", "429", "503"} <= set(operation["responses"])


def test_the_smallest_body_is_an_example(server: Server) -> None:
    spec = server.http.get("/openapi.json").json()
    examples = spec["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples["smallest"]["value"]) == {"model", "dataset", "scheme"}
    dataset = spec["components"]["schemas"]["JobSubmit"]["properties"]["dataset"]
    assert {"type": "string"} in dataset["anyOf"]
