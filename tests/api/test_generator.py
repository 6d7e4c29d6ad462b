"""A generator of clients takes the OpenAPI document without a complaint, and what it makes works."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from fastapi import FastAPI

from api.jobs.ledger.views import JobRead
from tests.api.conftest import Server
from tests.support.serving import serving

pytestmark = pytest.mark.generator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "conformance"
BIN = ROOT / ".venv-generator" / "bin"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the generated package, bitmill_client."""
    folder = tmp_path_factory.mktemp("generated")
    where = ("--path", ROOT / "docs" / "openapi.json", "--config", FOLDER / "generator.yml")
    command = (BIN / "openapi-python-client", "generate", *where, "--meta", "none")
    made = subprocess.run(
        [*map(str, command), "--output-path", str(folder / "bitmill_client"), "--fail-on-warning"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in (made.stdout + made.stderr).lower()
    return folder


def test_a_generated_client_works(generated: Path, server: Server) -> None:
    app = server.http.app
    assert isinstance(app, FastAPI)
    key = server.http.headers["Authorization"].removeprefix("Bearer ")
    with serving(app, lifespan="off") as url:
        done = subprocess.run(
            [BIN / "python", FOLDER / "generated.py", url, key],
            input=json.dumps(server.body(priority=3)),
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(generated)},
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    listed = server.http.get("/v1/schemes").json()["items"]
    assert answer["schemes"] == [scheme["name"] for scheme in listed]
    kept = server.http.get("/v1/jobs").json()["items"][1]
    assert JobRead.model_validate(answer["job"]) == JobRead.model_validate(kept)
    assert (answer["clone"]["scheme"], answer["clone"]["priority"]) == ("W8A16", 7)
    assert answer["clone"]["calibration"] == answer["job"]["calibration"]
