"""Stores of both kinds, and a succeeded job with files behind a real server on a real port."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from api.client import Client
from api.jobs.queue import leases
from api.jobs.queue.workers import WorkerIdentity
from api.main import create_app
from api.store.base import Store
from api.store.factory import open_store
from api.store.keys import artifact_key
from tests.api.conftest import Server
from tests.api.store.conftest import file as file
from tests.api.store.conftest import in_s3 as in_s3
from tests.support.serving import serving

CONTENT = {
    "model-00001-of-00001.safetensors": bytes(range(256)) * 12_000,  # three chunks
    "config.json": b"{}",
    "sub folder/ünï.txt": b"text",
    "empty": b"",
}
BIG = "model-00001-of-00001.safetensors"


@dataclass(frozen=True)
class Published:
    """A succeeded job with files, behind a server on a port."""

    url: str
    key: str
    job_id: str
    token: int
    store: Store

    def path(self, name: str) -> str:
        return f"{self.url}/v1/jobs/{self.job_id}/artifacts/{name}"

    def get(self, name: str, **headers: str) -> httpx.Response:
        headers["Authorization"] = f"Bearer {self.key}"
        return httpx.get(self.path(name), headers=headers, trust_env=False)

    def head(self, name: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.head(self.path(name), headers=headers, trust_env=False)


def publish(server: Server, tmp_path: Path) -> tuple[str, int]:
    """What a worker does at the end of a job."""
    job_id = server.submit()["id"]
    store = open_store(server.settings.store_url)
    with server.database.write() as session:
        claimed = leases.claim(session, WorkerIdentity("w", "cpu", 1 << 40, 0), 90)
    assert claimed is not None
    lease, _ = claimed
    files = []
    for name, content in CONTENT.items():
        file = tmp_path / "out"
        file.write_bytes(content)
        store.put(artifact_key(job_id, lease.token, name), file)
        file.unlink()
        files.append({"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"job": job_id, "files": files}))
    key = artifact_key(job_id, lease.token, "manifest.json")
    store.put(key, manifest)
    with server.database.write() as session:
        leases.succeed(session, lease, {}, key)
    return job_id, lease.token


@pytest.fixture
def published(server: Server, tmp_path: Path) -> Iterator[Published]:
    job_id, token = publish(server, tmp_path)
    key = server.http.headers["Authorization"].removeprefix("Bearer ")
    with serving(create_app(server.settings)) as url:
        yield Published(url, key, job_id, token, open_store(server.settings.store_url))


@pytest.fixture
def client(published: Published) -> Iterator[Client]:
    with Client(published.url, published.key, retry_seconds=0) as client:
        yield client
