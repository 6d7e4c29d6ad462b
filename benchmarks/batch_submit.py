"""How long a batch of 1,000 jobs on 10 local models takes to be accepted.

    python -m benchmarks.batch_submit

The server and SQLite are real, in this process; the models are tiny. `python -m benchmarks.load` does it on
PostgreSQL, and with larger models.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

import migrations
from api.main import create_app
from api.settings import Settings
from benchmarks.console import say
from benchmarks.load.batches import VARIANTS
from tests.support.models import tiny_dataset, tiny_model

MODELS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "models")
        first = tiny_model(root / "0")
        models = [first, *(Path(shutil.copytree(first, root / str(n))) for n in range(1, MODELS))]
        dataset = tiny_dataset(root / "texts.jsonl")
        settings = Settings(data_dir=Path(scratch, "data"), local_roots=(root,))
        migrations.upgrade(settings.database_url)
        with TestClient(create_app(settings)) as http:
            key = json.loads(settings.credentials_file.read_text())["api_key"]
            http.headers["Authorization"] = f"Bearer {key}"
            for plans, variants in VARIANTS.items():
                jobs = [
                    {"model": str(model), "dataset": str(dataset), **variant}
                    for model in models
                    for variant in variants
                ]
                say(f"1,000 jobs, {plans} plans: {_seconds(http, jobs):.2f} s")


def _seconds(http: TestClient, jobs: list[dict[str, Any]]) -> float:
    started = time.perf_counter()
    answer = http.post("/v1/batches", json={"jobs": jobs})
    seconds = time.perf_counter() - started
    assert answer.json()["counts"]["accepted"] == len(jobs), answer.text
    return seconds


if __name__ == "__main__":
    main()
