"""A trace leads from the request through the queue and the worker to every layer of the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from api.client.types import AcceptedItem, BatchSubmit
from tests.integration.service import Service
from tests.support.otlp import Collector, Span, running_collector

Body = dict[str, Any]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "bitmill_" + 40 * "x"


@dataclass(frozen=True)
class Traced:
    """What a service told its collector, and what it did meanwhile."""

    collector: Collector
    job_id: str
    failed_id: str
    batch_job_id: str
    log: str


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, inputs: Path, small: Body) -> Iterator[Traced]:
    """A job whose caller has a trace of its own, one that fails, and one of a batch, in a service that has
    ended since."""
    with running_collector() as collector:
        service = Service(tmp_path_factory.mktemp("traced"), inputs, OTLP_ENDPOINT=collector.url)
        try:
            serve = service.start()
            key = json.loads((service.data / "credentials.json").read_text())["api_key"]
            url = f"http://127.0.0.1:{service.port}/v1/jobs"
            known = {"Authorization": f"Bearer {key}", "X-Request-ID": "asked"}
            caller = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            job_id = httpx.post(url, json=small, headers=known | caller).json()["id"]
            service.succeed(job_id)
            failed = service.submit(**small, max_runtime_seconds=1)
            service.wait(failed)
            jobs = cast("BatchSubmit", {"jobs": [{"cache": "bypass", **small}]})
            (item,) = service.client.submit_batch(jobs)["items"]
            batch = cast("AcceptedItem", item)["job_id"]
            service.succeed(batch)
            httpx.get(f"{url}?model={SECRET}", headers=known)
            assert serve.stop() == 0
        finally:
            service.close()
        yield Traced(collector, job_id, failed, batch, serve.log.read_text())


def attempt(traced: Traced, job_id: str) -> Span:
    (found,) = traced.collector.named("attempt", **{"bitmill.job_id": job_id})
    return found


def children(traced: Traced, span: Span) -> list[Span]:
    return sorted((each for each in traced.collector.spans if each.parent == span.id), key=lambda s: s.start)


def test_the_caller_s_trace_goes_on_in_the_request_and_the_attempt(traced: Traced) -> None:
    request = next(span for span in traced.collector.named("POST /v1/jobs") if span.trace == TRACE)
    assert request.parent == CALLER
    assert request.attributes["http.route"] == "/v1/jobs"
    assert request.attributes["http.response.status_code"] == 202
    found = attempt(traced, traced.job_id)
    assert (found.trace, found.parent) == (TRACE, request.id)
    assert found.attributes["bitmill.outcome"] == "succeeded"
    assert not found.failed
    assert {span.service for span in traced.collector.spans} == {"bitmill"}
    assert traced.collector.paths == {"/v1/traces"}


def test_an_attempt_has_its_phases_and_these_the_layers(traced: Traced) -> None:
    found = attempt(traced, traced.job_id)
    phases = children(traced, found)
    assert [span.name for span in phases] == ["fetch", "plan", "compress", "verify", "upload"]
    assert all(found.start <= span.start <= span.end <= found.end for span in phases)
    layers = children(traced, phases[2])
    assert [(span.name, span.attributes["bitmill.layer"]) for span in layers] == [
        ("layer_solved", 0),
        ("layer_solved", 1),
    ]
    assert all(0 < span.end - span.start < 60e9 for span in layers)


def test_an_attempt_that_fails_says_why(traced: Traced) -> None:
    found = attempt(traced, traced.failed_id)
    assert found.failed
    assert found.attributes["error.type"] == "max_runtime_seconds"
    assert found.attributes["bitmill.outcome"] == "timed_out"


def test_an_item_of_a_batch_is_a_trace_of_its_own_linked_to_the_request(traced: Traced) -> None:
    (request,) = traced.collector.named("POST /v1/batches")
    found = attempt(traced, traced.batch_job_id)
    assert found.trace != request.trace
    assert found.parent == ""
    assert found.links == [(request.trace, request.id)]


def test_records_name_the_trace_they_belong_to(traced: Traced) -> None:
    lines = [line for line in traced.log.splitlines() if '"attempt_ended"' in line]
    (line,) = [line for line in lines if traced.job_id in line]
    assert f'"trace_id": "{TRACE}"' in line


def test_what_a_url_asks_for_is_not_told(traced: Traced) -> None:
    (span,) = traced.collector.named("GET /v1/jobs", **{"bitmill.request_id": "asked"})
    assert span.attributes["url.query"] == "[hidden]"
    assert SECRET not in str(traced.collector.spans)
    assert SECRET not in traced.log


def test_probes_are_not_traced(traced: Traced) -> None:
    assert not [span for span in traced.collector.spans if span.attributes.get("url.path") == "/readyz"]
