"""Downloads over HTTP, and the client that resumes and checks them. A real server on a real port."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import httpx
import pytest

from api.client import ApiError, Client, DigestMismatch
from api.store.keys import artifact_key
from tests.api.artifacts.conftest import BIG, CONTENT, Published


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
