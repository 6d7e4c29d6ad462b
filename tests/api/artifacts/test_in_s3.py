"""Downloads where files are in S3: the server sends callers there, to an address that is good for a while."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from api.client import ApiError, Client
from api.settings import Settings
from api.store.factory import open_store
from tests.api.artifacts.conftest import BIG, CONTENT, Published
from tests.api.conftest import Server
from tests.support.gate import Gate


@pytest.fixture
def settings(settings: Settings, gate: Gate) -> Settings:
    return settings.model_copy(update={"store_url": gate.store_url})


def test_a_download_is_sent_to_the_store(published: Published, gate: Gate) -> None:
    for name, content in CONTENT.items():
        answer = published.get(name)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (307, "no-store"), name
        there = answer.headers["Location"]
        assert there.startswith(f"{gate.url}/store/")
        assert "X-Amz-Expires=900&" in there
        whole = httpx.get(there, trust_env=False)
        assert (whole.status_code, whole.content) == (200, content)
        assert whole.headers["Content-Type"] == "application/octet-stream"
        assert whole.headers["Content-Disposition"].startswith("attachment; filename*=UTF-8''")
    part = httpx.get(
        published.get(BIG).headers["Location"], headers={"Range": "bytes=1000000-2500000"}, trust_env=False
    )
    assert (part.status_code, part.content) == (206, CONTENT[BIG][1_000_000:2_500_001])


def test_what_the_server_answers_by_itself(published: Published) -> None:
    head = published.head(BIG)
    etag = f'"{hashlib.sha256(CONTENT[BIG]).hexdigest()}"'
    assert (head.status_code, head.headers["ETag"]) == (200, etag)
    assert head.headers["Content-Length"] == str(len(CONTENT[BIG]))
    assert published.get(BIG, **{"If-None-Match": etag}).status_code == 304
    assert published.get("manifest.json").json()["code"] == "artifact_not_found"


def test_an_address_is_good_for_so_long(in_s3: str, file: Path) -> None:
    store = open_store(in_s3)
    store.put("a", file)
    url = store.url("a", "a", 1)
    assert url is not None
    give_up = time.monotonic() + 20
    while (status := httpx.get(url, trust_env=False).status_code) == 200 and time.monotonic() < give_up:
        time.sleep(0.1)
    assert status == 403


class TestClient:
    def test_everything_arrives(self, client: Client, published: Published, tmp_path: Path) -> None:
        for number, file in enumerate(client.artifacts(published.job_id)["files"]):
            assert file["url"].startswith(f"/v1/jobs/{published.job_id}/artifacts/")
            client.download(published.job_id, file["name"], tmp_path / str(number))
            assert (tmp_path / str(number)).read_bytes() == CONTENT[file["name"]]

    @pytest.mark.parametrize("there", [CONTENT[BIG][:1_500_000], b"x" * 1000], ids=["a part", "another"])
    def test_goes_on_from_what_is_there(
        self, client: Client, published: Published, tmp_path: Path, there: bytes
    ) -> None:
        target = tmp_path / "target"
        target.write_bytes(there)
        client.download(published.job_id, BIG, target)
        assert target.read_bytes() == CONTENT[BIG]

    def test_a_file_that_is_gone(self, client: Client, published: Published, tmp_path: Path) -> None:
        published.store.delete(f"artifacts/{published.job_id}/{published.token}/config.json")
        with pytest.raises(ApiError) as caught:
            client.download(published.job_id, "config.json", tmp_path / "target")
        assert (caught.value.status, caught.value.code) == (404, "store_refused")
        assert "X-Amz-Signature" not in str(caught.value)


def test_a_store_that_is_away(server: Server, published: Published, gate: Gate) -> None:
    assert server.http.get("/readyz").status_code == 200
    gate.shut()
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["code"]) == (503, "store_unavailable")
    answer = published.get(BIG)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unreachable")
    assert answer.json()["hint"]
    assert int(answer.headers["Retry-After"]) > 0


@contextmanager
def answering(
    answers: dict[str, tuple[int, dict[str, str], bytes]],
) -> Iterator[tuple[str, list[Message]]]:
    """A server with an answer for each path, and the headers of every request that came."""
    came: list[Message] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.headers)
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", came
        http.shutdown()
        thread.join()


def test_the_store_is_asked_for_the_rest_and_gets_no_key(tmp_path: Path) -> None:
    entry = {"name": "file", "size": 5, "sha256": hashlib.sha256(b"bytes").hexdigest()}
    listed = json.dumps({"job": "job", "files": [entry]}).encode()
    (tmp_path / "file").write_bytes(b"by")
    with answering({"/there": (206, {}, b"tes")}) as (store, came_there):
        elsewhere = (307, {"Location": f"{store}/there"}, b"")
        path = "/v1/jobs/job/artifacts"
        with (
            answering({path: (200, {}, listed), f"{path}/file": elsewhere}) as (url, came),
            Client(url, "key") as client,
        ):
            client.download("job", "file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"bytes"
    assert [headers["Authorization"] for headers in came] == ["Bearer key", "Bearer key"]
    assert [(headers["Authorization"], headers["Range"]) for headers in came_there] == [(None, "bytes=2-")]
