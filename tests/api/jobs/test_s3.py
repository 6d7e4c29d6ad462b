"""Datasets in S3 in a submission: only below the prefixes of the setting, and nothing is asked of S3."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from api.jobs.models import Job
from api.settings import Settings
from tests.api.conftest import Server

PREFIXES = ("s3://texts/public", "s3://more")


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    prefixes: Sequence[str] = getattr(request, "param", PREFIXES)
    return settings.model_copy(update={"s3_prefixes": tuple(prefixes)})


@pytest.mark.parametrize(
    "dataset",
    ["s3://texts/public/a.jsonl", {"s3": "s3://more/a.parquet", "text_column": "body", "etag": "0"}],
)
def test_what_lies_below_a_prefix_is_accepted_unseen(server: Server, dataset: object) -> None:
    job = server.submit(dataset=dataset)
    address = dataset["s3"] if isinstance(dataset, dict) else dataset
    assert job["dataset"] == address
    with server.database.read() as session:
        row = session.get_one(Job, job["id"])
        assert row.dataset is not None
        assert row.dataset["s3"] == address


@pytest.mark.parametrize("settings", [(), PREFIXES], indirect=True)
@pytest.mark.parametrize(
    "dataset", ["s3://texts/a.jsonl", "s3://texts/publicity/a.jsonl", "s3://mor/e/a.txt"]
)
def test_everything_else_is_refused(server: Server, dataset: str) -> None:
    answer = server.http.post("/v1/jobs", json=server.body(dataset=dataset))
    (error,) = answer.json()["errors"]
    assert (answer.status_code, error["code"], error["pointer"]) == (422, "path_not_allowed", "/dataset")
    assert "BITMILL_S3_PREFIXES" in error["hint"]


class TestTheServicesOwnStore:
    """Is nobody's dataset, whatever the prefixes say."""

    @pytest.fixture(params=["s3://texts/public", "s3://texts", "s3://texts/public/work/"])
    def store_url(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def settings(self, settings: Settings, store_url: str) -> Settings:
        return settings.model_copy(update={"store_url": store_url})

    def test_it_is_refused(self, server: Server) -> None:
        inside, beside = "s3://texts/public/work/a.jsonl", "s3://more/work/a.jsonl"
        answer = server.http.post("/v1/jobs", json=server.body(dataset=inside))
        (error,) = answer.json()["errors"]
        assert (answer.status_code, error["code"]) == (422, "path_not_allowed")
        assert "own files" in error["hint"]
        assert server.submit(dataset=beside)["dataset"] == beside


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ("s3://more/model.safetensors", "dataset_format_unsupported"),
        ("s3://more", "validation_error"),
        ("s3://more/../texts/a.txt", "validation_error"),
    ],
)
def test_what_is_no_dataset_is_refused(server: Server, dataset: str, code: str) -> None:
    answer = server.http.post("/v1/jobs", json=server.body(dataset=dataset))
    assert (answer.status_code, answer.json()["code"]) == (422, code)
