"""A real app over a real SQLite file with the real migrations, and a model and a dataset below its root."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import migrations
from api.database import Database
from api.main import create_app
from api.settings import Settings
from tests.support.postgres import new_database
from tests.support.transactions import kept_while_answering


@dataclass(frozen=True)
class Server:
    """An app with its settings; `http` sends the first key."""

    settings: Settings
    database: Database
    http: TestClient
    model: Path
    dataset: Path

    def body(self, **more: Any) -> dict[str, Any]:
        """The smallest sensible submission, with changes."""
        return {
            "model": str(self.model),
            "dataset": str(self.dataset),
            "scheme": "W4A16",
            "calibration": {"num_calibration_samples": 4, "max_seq_length": 64},
            **more,
        }

    def submit(self, **more: Any) -> dict[str, Any]:
        """Submit a job that is accepted, and return it."""
        answer = self.http.post("/v1/jobs", json=self.body(**more))
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of its own at the newest revision, in turn on each of the two kinds."""
    if request.param == "postgresql":
        with new_database(request.getfixturevalue("postgres")) as url:
            yield url
    else:
        file = tmp_path / "bitmill.db"
        shutil.copy(request.getfixturevalue("migrated_file"), file)
        yield f"sqlite:///{file}"


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    root = tmp_path / "root"
    root.mkdir()
    data = tmp_path / "data"
    data.mkdir()
    return Settings(data_dir=data, database_url=database_url, local_roots=(root,), max_body_bytes=200_000)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database at the newest revision, to be copied."""
    file = tmp_path_factory.mktemp("migrated") / "bitmill.db"
    migrations.upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def server(settings: Settings, database: Database, tiny_llama: Path, tiny_texts: Path) -> Iterator[Server]:
    (root,) = settings.local_roots
    model = Path(shutil.copytree(tiny_llama, root / "tiny"))
    dataset = Path(shutil.copy(tiny_texts, root))
    app = create_app(settings)
    with (
        kept_while_answering(app) as kept,
        TestClient(app, raise_server_exceptions=False) as http,
    ):
        key = json.loads(settings.credentials_file.read_text())["api_key"]
        http.headers["Authorization"] = f"Bearer {key}"
        yield Server(settings, database, http, model, dataset)
    assert kept == [], "a transaction was open while an answer was made"
