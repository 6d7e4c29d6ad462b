"""The API keeps to its OpenAPI document, whatever it is sent: all of schemathesis, on all operations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, assume, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.api.conftest import Server
from tests.api.test_isolation import PARTS, own_things
from tests.api.test_openapi import errors_of

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())
OPERATIONS = [(method, path) for path, item in DOCUMENT["paths"].items() for method in item]
ASKED = [
    (method, path)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if {"parameters", "requestBody"} & operation.keys()
]
"""Those that take something, which may then be wrong."""
# What a document cannot say is refused with a 422: that a model exists, that a scheme fits it.
ACCEPTED = ["2xx", "3xx", "401", "403", "404", "409", "422", "429", "5xx"]
CONFIG = {"checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}}}
EXAMPLES = 15


def find(server: Server, method: str, path: str) -> APIOperation:
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(CONFIG))
    schema.app = server.http.app
    operation: APIOperation = schema[path][method]
    return operation


def has_refused(case: schemathesis.Case, answer: Response) -> bool:
    """Of a batch, which is accepted without the items that are wrong."""
    if case.path != "/v1/batches" or answer.status_code not in (200, 202):
        return False
    counts = answer.json()
    return bool(counts.get("counts", counts).get("refused"))


def check(server: Server, operation: APIOperation, mode: GenerationMode, things: dict[str, str]) -> None:
    """Send made-up requests, and hold each answer against the document. things: what paths name."""

    told = errors_of(operation.definition.raw)

    @seed(0)
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def keeps(case: schemathesis.Case) -> None:
        assume([] not in (case.query or {}).values())  # which is not sent: what should be wrong is missing
        case.path_parameters.update({name: things[name] for name in case.path_parameters if name in things})
        answer = case.call(headers={"Authorization": server.http.headers["Authorization"]})
        but = [negative_data_rejection] if has_refused(case, answer) else []
        case.validate_response(answer, excluded_checks=but)
        if answer.status_code >= 400:
            assert answer.json()["code"] in told[answer.status_code]

    keeps()


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=str)
def test_what_the_document_allows(server: Server, method: str, path: str) -> None:
    check(server, find(server, method, path), GenerationMode.POSITIVE, {})


@pytest.mark.parametrize(("method", "path"), ASKED, ids=str)
def test_what_it_does_not_allow(server: Server, method: str, path: str) -> None:
    check(server, find(server, method, path), GenerationMode.NEGATIVE, {})


@pytest.mark.parametrize(("method", "path"), [each for each in OPERATIONS if "{" in each[1]], ids=str)
def test_things_that_are_there(server: Server, method: str, path: str) -> None:
    things = own_things(server) | PARTS
    server.http.post(f"/v1/jobs/{things['job_id']}/cancel")  # so that no stream and no wait has to go on
    check(server, find(server, method, path), GenerationMode.POSITIVE, things)
