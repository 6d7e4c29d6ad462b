"""The files that jobs publish, and downloads that go on after a break."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx

from api.client.base import Base, in_path
from api.client.drivers import call
from api.client.errors import DigestMismatch
from api.client.flows import Backoff, Do, Flow, Open, Pause, Read, Request, answered
from api.client.types import ArtifactList


class ArtifactCalls(Base):
    """Calls below /v1/jobs/{job_id}/artifacts."""

    @call
    def artifacts(self, job_id: str) -> Flow[ArtifactList]:
        """The files that a job published, with size and sha256."""
        return self._get(in_path("jobs", job_id, "artifacts"))

    @call
    def download(self, job_id: str, name: str, path: Path) -> Flow[None]:
        """Download one file to `path`, going on from what is there of it, and check its sha256.

        The server may say that the file is elsewhere, at an address that needs no key and gets none.

        Raises:
            DigestMismatch: nothing is left at `path` then.
        """
        files = in_path("jobs", job_id, "artifacts")
        url = f"{files}/{quote(name)}"
        listed: ArtifactList = yield from self._get(files)
        file = next((file for file in listed["files"] if file["name"] == name), None)
        if file is None:
            yield from self._get(url)  # which says so
            raise AssertionError("a file that is not listed is not found")
        for _ in range(2):  # what was there may be the rest of another file: then once more, anew
            yield from self._fetch(url, path, file["size"])
            if (yield Do(partial(_sha256, path))) == file["sha256"]:
                return
            yield Do(path.unlink)
        raise DigestMismatch(f"{name} arrived with another digest than the manifest names")

    def _fetch(self, url: str, path: Path, size: int) -> Flow[None]:
        """Append what is missing; a connection that breaks is taken up where it broke."""
        backoff = Backoff(self.retry_seconds)
        yield Do(path.touch)
        while (have := (yield Do(lambda: path.stat().st_size))) < size:
            try:
                yield from self._append(url, path, have, backoff)
            except httpx.TransportError:
                pause = backoff.next_pause()
                if pause is None:
                    raise
                yield Pause(pause)

    def _append(self, url: str, path: Path, have: int, backoff: Backoff) -> Flow[None]:
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        response = yield from answered(Open(Request("GET", url, headers=headers, repeatable=True)), backoff)
        with (yield Do(partial(path.open, "ab" if response.status_code == 206 else "wb"))) as file:
            while (chunk := (yield Read())) is not None:
                yield Do(partial(file.write, chunk))
                backoff.reset()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
