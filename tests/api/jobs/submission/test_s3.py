"""Datasets in S3 in a submission, and copies of its files there: only where the project may, and nothing is
asked of S3."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from api.errors import Conflict
from api.jobs.ledger.models import Job
from api.security import Scope
from api.settings import Settings
from tests.api.conftest import Server
from tests.api.projects.limiting import limit
from tests.api.test_security import new_server_key

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

    def test_nothing_is_copied_there(self, server: Server) -> None:
        limit(server.database, output_prefixes=["s3://texts", "s3://more"])
        answer = server.http.post("/v1/jobs", json=server.body(output="s3://texts/public"))
        assert (answer.status_code, answer.json()["code"]) == (422, "output_not_allowed")
        assert server.submit(output="s3://more/models")["output"] == "s3://more/models"


class TestProjects:
    """Two projects; the first may have files copied to a place where the server lets everybody read."""

    @pytest.fixture
    def other(self, server: Server) -> dict[str, str]:
        limit(server.database, output_prefixes=["s3://more/own/", "s3://more/second"])
        return new_server_key(server, "other", Scope.SUBMIT)

    def asked(self, server: Server, key: dict[str, str] | None = None, **body: object) -> list[str]:
        """The codes of what is wrong, told for a job, for its estimate and for a batch of it alike."""
        whole = server.body(**body)
        answers = [
            server.http.post(path, json=whole, headers=key) for path in ("/v1/jobs", "/v1/jobs/estimate")
        ]
        batch = server.http.post("/v1/batches?dry_run=true", json={"jobs": [whole]}, headers=key).json()
        errors = [answer.json().get("errors", []) for answer in answers]
        errors.append(batch["items"][0].get("error", {"errors": []})["errors"])
        codes = [[error["code"] for error in each] for each in errors]
        assert codes[0] == codes[1] == codes[2]
        return codes[0]

    def test_nobody_reads_where_another_writes(self, server: Server, other: dict[str, str]) -> None:
        theirs = {"dataset": "s3://more/own/job/1/merges.txt"}
        assert self.asked(server, **theirs) == []
        assert self.asked(server, other, **theirs) == ["path_not_allowed"]
        assert self.asked(server, other, dataset="s3://more/owner/a.txt") == []

    def test_a_project_writes_where_it_may(self, server: Server, other: dict[str, str]) -> None:
        for output in ("s3://more/own", "s3://more/own/models/", "s3://more/second"):
            assert self.asked(server, output=output) == []
            assert self.asked(server, other, output=output) == ["output_not_allowed"]
        for output in ("s3://more/owner", "s3://more", "s3://texts/public"):
            assert self.asked(server, output=output) == ["output_not_allowed"]
        for output in ("s3://more/own/../second", "/models"):
            assert self.asked(server, output=output) == ["value_error"]

    def test_a_clone_has_it_too_and_is_held_to_it(self, server: Server) -> None:
        limit(server.database, output_prefixes=["s3://more/own"])
        job = server.submit(output="s3://more/own/models/")
        assert job["output"] == "s3://more/own/models"
        again = server.http.post(f"/v1/jobs/{job['id']}/clone", json={}).json()
        assert again["output"] == job["output"]
        limit(server.database, output_prefixes=None)
        refused = server.http.post(f"/v1/jobs/{job['id']}/clone", json={})
        assert (refused.status_code, refused.json()["code"]) == (422, "output_not_allowed")

    def test_a_project_reads_by_its_own_prefixes_where_it_has_some(
        self, server: Server, other: dict[str, str]
    ) -> None:
        limit(server.database, "other", s3_prefixes=["s3://others"])
        assert self.asked(server, other, dataset="s3://others/a.txt") == []
        assert self.asked(server, other, dataset="s3://texts/public/a.txt") == ["path_not_allowed"]
        limit(server.database, "other", s3_prefixes=[])
        assert self.asked(server, other, dataset="s3://others/a.txt") == ["path_not_allowed"]
        limit(server.database, "other", s3_prefixes=None)
        assert self.asked(server, other, dataset="s3://texts/public/a.txt") == []

    def test_a_project_sees_its_own(self, server: Server, other: dict[str, str]) -> None:
        own, others = (server.http.get("/v1/project", headers=key).json() for key in (None, other))
        assert own["output_prefixes"] == ["s3://more/own", "s3://more/second"]
        assert own["s3_prefixes"] == others["s3_prefixes"] == list(PREFIXES)
        assert others["output_prefixes"] == []

    def test_two_projects_do_not_write_to_one_place(self, server: Server, other: dict[str, str]) -> None:
        for prefix in ("s3://more/own", "s3://more/own/part", "s3://more"):
            with pytest.raises(Conflict) as caught:
                limit(server.database, "other", output_prefixes=[prefix])
            assert caught.value.code == "prefix_taken"
        limit(server.database, "other", output_prefixes=["s3://more/others"])
        assert self.asked(server, other, output="s3://more/others") == []


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
