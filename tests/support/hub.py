"""A Hugging Face Hub on this machine: the few endpoints that its clients use, over files in memory.

    GET  /api/{models,datasets}/ID/revision/REV     commit and files, with sizes and digests
    GET  /api/{models,datasets}/ID/tree/REV/FOLDER  files of a folder
    POST /api/{models,datasets}/ID/paths-info/REV   files by name
    GET  /ID/resolve/REV/FILE                       the bytes, with Range; HEAD for size and digest

What can go wrong with the real one can be made to go wrong: repositories that need a token, connections that
are cut, bytes that are not what their digest says.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)(?:/(.*))?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_LFS_SUFFIXES = (".safetensors", ".parquet", ".gz", ".bin")


@dataclass
class Repository:
    """One commit of files. token: the only one that may read it; gated: shows its files' names only."""

    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        digest = hashlib.sha1(json.dumps(sorted(self.files)).encode())
        for content in self.files.values():
            digest.update(content)
        self.commit = digest.hexdigest()
        self.branches.setdefault("main", self.commit)
        self.digests = {name: _digest(name, content) for name, content in self.files.items()}


def _digest(name: str, content: bytes) -> str:
    """What the Hub calls a file's oid: sha256 of large files, git's blob hash of small ones."""
    if name.endswith(_LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Hub:
    """The running server. requests counts by method and path; served counts bytes of files by their name.

    hold: by file name, what an answer with the file's bytes waits for before it sends the first of them.
    cut: by file name, after how many bytes the next answers are cut off, one entry for each.
    corrupt: names of files whose last byte is wrong.
    """

    url: str
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    hold: dict[str, threading.Event] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)

    def add_model(self, id: str, folder: Path, **more: Any) -> Repository:
        """Publish the files of a folder as a model."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self._add("models", id, Repository(files, **more))

    def add_dataset(self, id: str, files: dict[str, bytes], **more: Any) -> Repository:
        """Publish files as a dataset."""
        return self._add("datasets", id, Repository(files, **more))

    def _add(self, kind: str, id: str, repository: Repository) -> Repository:
        self.repositories[kind, id] = repository
        return repository


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.hub = Hub(f"http://127.0.0.1:{self.server_port}")


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine, with nothing on it."""
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    """An answer without the thing that was asked for."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _hub(self) -> Hub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        path = unquote(url.path)
        self._hub.requests[f"{self.command} {path}"] += 1
        try:
            if found := _API.fullmatch(path):
                self._api(found, parse_qs(url.query), body)
            elif found := _RESOLVE.fullmatch(path):
                self._file(found)
            else:
                raise _Refused(404, "EntryNotFound")
        except _Refused as refused:
            self.send_response(refused.status)
            self.send_header("X-Error-Code", refused.code)
            self.send_header("X-Error-Message", refused.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _repository(self, kind: str, id: str, revision: str) -> tuple[Repository, str]:
        """The repository and the commit; whoever may not see it does not learn whether it is there."""
        repository = self._hub.repositories.get((kind, id))
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None or (repository.token is not None and given != repository.token):
            raise _Refused(404 if given else 401, "RepoNotFound")
        commit = repository.branches.get(revision, revision)
        if commit != repository.commit:
            raise _Refused(404, "RevisionNotFound")
        return repository, commit

    def _api(self, found: re.Match[str], query: dict[str, list[str]], body: bytes) -> None:
        kind, id, what, revision, folder = found.groups()
        repository, commit = self._repository(kind, id, revision)
        if what == "revision":
            return self._json(_info(repository, id, commit, blobs=_is_set(query, "blobs")))
        if what == "tree":
            return self._json(_tree(repository, folder or "", recursive=_is_set(query, "recursive")))
        content = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        wanted = [path for path in content["paths"] if path in repository.files]
        self._json([_entry(repository, path) for path in wanted])

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _file(self, found: re.Match[str]) -> None:
        kind, id, revision, name = found.groups()
        repository, commit = self._repository("datasets" if kind else "models", id, revision)
        if repository.gated:  # its description is public
            raise _Refused(403, "GatedRepo")
        if name not in repository.files:
            raise _Refused(404, "EntryNotFound")
        content = repository.files[name]
        if name in self._hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin, end = 0, len(content)
        if asked := _RANGE.fullmatch(self.headers.get("Range") or ""):
            begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        digest = repository.digests[name]
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", commit)
        if name.endswith(_LFS_SUFFIXES):
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self._hub.hold:
            self._hub.hold[name].wait()
        part = content[begin:end]
        if cuts := self._hub.cut.get(name):
            part = part[: cuts.pop(0)]
            self.close_connection = True
        self._hub.served[name] += len(part)
        self.wfile.write(part)


def _is_set(query: dict[str, list[str]], name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("1", "true")


def _entry(repository: Repository, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(repository.files[name]),
        "oid": repository.digests[name],
    }
    if name.endswith(_LFS_SUFFIXES):
        entry["lfs"] = {"oid": entry["oid"], "size": entry["size"], "pointerSize": 134}
    return entry


def _tree(repository: Repository, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    inside = [name for name in repository.files if name.startswith(prefix)]
    if recursive:
        return [_entry(repository, name) for name in inside]
    files = [_entry(repository, name) for name in inside if "/" not in name[len(prefix) :]]
    folders = {prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]}
    return files + [
        {"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)
    ]


def _info(repository: Repository, id: str, commit: str, *, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = [{"rfilename": name} for name in repository.files]
    if blobs:
        for sibling in siblings:
            entry = _entry(repository, sibling["rfilename"])
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {"sha256": entry["oid"], "size": entry["size"], "pointerSize": 134}
    return {
        "_id": "0" * 24,
        "id": id,
        "sha": commit,
        "private": repository.token is not None,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }


def online(monkeypatch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """What the Hugging Face libraries would have read from their variables when they were imported: in the
    tests' own process these forbid the network."""
    for name, value in _constants(hub, home).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_CACHE_HOME": str(home)}.items():
        monkeypatch.setattr(f"datasets.config.{name}", value)


def _constants(hub: Hub, home: Path) -> dict[str, Any]:
    template = "/{repo_id}/resolve/{revision}/{filename}"
    return {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + template,
        "HF_HUB_CACHE": str(home / "hub"),
    }
