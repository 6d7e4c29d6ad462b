"""Downloads over HTTP, and the client that resumes and checks them. A real server on a real port."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from api.artifacts.store import artifact_key
from api.client import ApiError, Client, DigestMismatch
from tests.api.artifacts.conftest import BIG, CONTENT, Published
from tests.api.conftest import Server


class TestDownloads:
    def test_whole_files_with_their_digest(self, published: Published) -> None:
        for name, content in CONTENT.items():
            answer = published.get(name)
            digest = hashlib.sha256(content)
            assert (answer.status_code, answer.content) == (200, content), name
            assert answer.headers["ETag"] == f'"{digest.hexdigest()}"'
            expected = base64.b64encode(digest.digest()).decode()
            assert answer.headers["Repr-Digest"] == f"sha-256=:{expected}:"
            assert answer.headers["Content-Length"] == str(len(content))
            assert answer.headers["Accept-Ranges"] == "bytes"

    def test_a_part(self, published: Published) -> None:
        answer = published.get(BIG, Range="bytes=1000000-2500000")
        assert answer.status_code == 206
        assert answer.content == CONTENT[BIG][1_000_000:2_500_001]
        assert answer.headers["Content-Range"] == f"bytes 1000000-2500000/{len(CONTENT[BIG])}"

    def test_beyond_the_end(self, published: Published) -> None:
        answer = published.get("config.json", Range="bytes=2-")
        assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["Content-Range"] == "bytes */2"

    def test_if_range(self, published: Published) -> None:
        etag = published.get("config.json").headers["ETag"]
        part = published.get("config.json", **{"Range": "bytes=1-", "If-Range": etag})
        assert (part.status_code, part.content) == (206, b"}")
        other = published.get("config.json", **{"Range": "bytes=1-", "If-Range": '"other"'})
        assert (other.status_code, other.content) == (200, b"{}")

    def test_not_modified(self, published: Published) -> None:
        etag = published.get("config.json").headers["ETag"]
        answer = published.get("config.json", **{"If-None-Match": f'"x", {etag}'})
        assert (answer.status_code, answer.content) == (304, b"")

    def test_head(self, published: Published) -> None:
        answer = published.head(BIG)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["Content-Length"] == str(len(CONTENT[BIG]))

    @pytest.mark.parametrize(
        "name", ["manifest.json", "nothing", "%2e%2e/%2e%2e/bitmill.db", "sub%20folder", "a%00"]
    )
    def test_only_what_the_manifest_names(self, published: Published, name: str) -> None:
        answer = published.get(name)
        assert (answer.status_code, answer.json()["code"]) == (404, "artifact_not_found")

    def test_files_that_are_gone(self, published: Published) -> None:
        published.store.delete(artifact_key(published.job_id, published.token, "config.json"))
        assert published.get("config.json").json()["code"] == "artifacts_gone"
        published.store.delete(f"artifacts/{published.job_id}")
        assert published.get(BIG).json()["code"] == "artifacts_gone"

    def test_a_body_too_large_for_a_real_server(self, published: Published) -> None:
        answer = httpx.post(
            f"{published.url}/v1/jobs",
            content=b"x" * 250_000,
            headers={"Authorization": f"Bearer {published.key}", "Content-Type": "application/json"},
            trust_env=False,
        )
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


class TestClient:
    def test_download_everything(self, client: Client, published: Published, tmp_path: Path) -> None:
        listed = client.artifacts(published.job_id)
        assert listed["job"] == published.job_id
        assert {file["name"]: file["size"] for file in listed["files"]} == {
            name: len(content) for name, content in CONTENT.items()
        }
        for number, file in enumerate(listed["files"]):
            client.download(published.job_id, file["name"], tmp_path / str(number))
            assert (tmp_path / str(number)).read_bytes() == CONTENT[file["name"]]
            assert httpx.get(
                published.url + file["url"],
                headers={"Authorization": f"Bearer {published.key}"},
                trust_env=False,
            ).is_success

    @pytest.mark.parametrize(
        "there",
        [CONTENT[BIG][:1_500_000], CONTENT[BIG], CONTENT[BIG] + b"more", b"x" * 1000],
        ids=["a part", "all of it", "too much", "something else"],
    )
    def test_goes_on_from_what_is_there(
        self, client: Client, published: Published, tmp_path: Path, there: bytes
    ) -> None:
        target = tmp_path / "file"
        target.write_bytes(there)
        client.download(published.job_id, BIG, target)
        assert target.read_bytes() == CONTENT[BIG]

    def test_a_damaged_store_is_noticed(self, client: Client, published: Published, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged"
        damaged.write_bytes(b"[]")
        published.store.put(artifact_key(published.job_id, published.token, "config.json"), damaged)
        with pytest.raises(DigestMismatch):
            client.download(published.job_id, "config.json", tmp_path / "file")
        assert not (tmp_path / "file").exists()

    def test_errors_are_told(self, client: Client, published: Published, tmp_path: Path) -> None:
        with pytest.raises(ApiError) as caught:
            client.download(published.job_id, "nothing", tmp_path / "file")
        assert (caught.value.status, caught.value.code) == (404, "artifact_not_found")
        with pytest.raises(ApiError) as caught:
            client.submit({"model": "/etc", "scheme": "W9"})
        assert caught.value.code == "unknown_scheme"
        assert {error["pointer"] for error in caught.value.errors} == {"/scheme", "/model"}
        assert caught.value.request_id
        with Client(published.url, "wrong") as stranger, pytest.raises(ApiError) as caught:
            stranger.jobs()
        assert caught.value.code == "wrong_key"

    def test_jobs(self, client: Client, server: Server) -> None:
        job = client.submit(server.body(), idempotency_key="k")
        assert client.submit(server.body(), idempotency_key="k")["id"] == job["id"]
        assert client.job(job["id"])["status"] == "queued"
        assert [found["id"] for found in client.jobs(status="queued")["items"]] == [job["id"]]
        assert client.events(job["id"], since=0)["items"][0]["type"] == "job_queued"
        with pytest.raises(TimeoutError):
            client.wait(job["id"], timeout_seconds=0, poll_seconds=0.01)
        assert client.cancel(job["id"])["status"] == "cancelled"
        assert client.wait(job["id"])["status"] == "cancelled"
        assert client.retry(job["id"])["status"] == "queued"
        assert client.workers() == {"items": []}
        with pytest.raises(ApiError, match="report_not_available"):
            client.report(job["id"])

    def test_keys(self, client: Client, published: Published) -> None:
        assert client.project()["name"] == "default"
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        made = client.create_key("reading", ["read"], expires_at=tomorrow)
        assert datetime.fromisoformat(made["expires_at"]) == tomorrow
        with Client(published.url, made["key"]) as reader:
            assert [job["id"] for job in reader.jobs()["items"]] == [published.job_id]
            page = client.keys(limit=1)
            assert page["items"][0]["id"] == made["id"]
            assert client.keys(cursor=page["next_cursor"])["items"][0]["name"] == "first key"
            client.revoke_key(made["id"])
            with pytest.raises(ApiError, match="wrong_key"):
                reader.jobs()

    def test_no_server(self) -> None:
        with Client("http://127.0.0.1:1", "key") as client, pytest.raises(httpx.TransportError):
            client.jobs()


class BreakingServer(threading.Thread):
    """Answers like a server of one file whose connections break after 1,000 bytes."""

    content = b"0123456789" * 350
    sha256 = hashlib.sha256(content).hexdigest()

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.ranges: list[int] = []

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65536).decode()
                if request.startswith("GET /v1/jobs/job/artifacts "):
                    listed = {"name": "file", "size": len(self.content), "sha256": self.sha256}
                    answer(connection, json.dumps({"job": "job", "files": [listed]}).encode())
                    continue
                start = int(request.partition("Range: bytes=")[2].partition("-")[0] or 0)
                self.ranges.append(start)
                answer(connection, self.content[start:], most=1000, part=start > 0)


def answer(connection: socket.socket, body: bytes, *, most: int | None = None, part: bool = False) -> None:
    """Announce the body and send no more than `most` bytes of it."""
    head = [
        "HTTP/1.1 " + ("206 Partial Content" if part else "200 OK"),
        f"Content-Length: {len(body)}",
        "Connection: close",
        "\r\n",
    ]
    connection.sendall("\r\n".join(head).encode() + body[:most])


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    breaking = BreakingServer()
    breaking.start()
    with Client(f"http://127.0.0.1:{breaking.port}", "key") as client:
        client.download("job", "file", tmp_path / "file")
    breaking.listener.close()
    assert (tmp_path / "file").read_bytes() == breaking.content
    assert breaking.ranges == [0, 1000, 2000, 3000]
