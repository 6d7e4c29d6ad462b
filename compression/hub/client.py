"""What is asked of the Hub before a download: which commit a revision is, its files, a few of their bytes.

`huggingface_hub` is not installed where only the API runs, so this is plain HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote

import httpx

from compression.boundary import parse_json, reason
from compression.errors import SourceError
from compression.hub.environment import HubEnvironment
from compression.hub.references import HubRef, Kind, is_commit

TIMEOUT_SECONDS = 10.0
MAX_FILES = 10_000
MAX_ANSWER_BYTES = 32 << 20


@dataclass(frozen=True)
class HubFile:
    """A file of a commit. sha256: of a large file, else None. blob: git's digest of a small file."""

    name: str
    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class HubCommit:
    """A repository at one commit: `ref` is pinned."""

    kind: Kind
    ref: HubRef
    files: Mapping[str, HubFile]


class HubClient:
    """One connection to the Hub; safe to share between threads.

    Raises, from every call, SourceError: hub_unreachable, hub_repository_not_found, hub_access_denied,
    hub_revision_not_found, hub_answer_invalid.
    """

    def __init__(self, environment: HubEnvironment) -> None:
        headers = {"User-Agent": "bitmill", "Accept-Encoding": "identity"}
        if environment.token:
            headers["Authorization"] = f"Bearer {environment.token}"  # httpx drops it where a redirect leaves
        self._endpoint = environment.endpoint
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def commit(self, kind: Kind, ref: HubRef) -> HubCommit:
        """The commit that a revision stands for, with the names, sizes and digests of its files."""
        path = f"/api/{kind}s/{ref.id}/revision/{quote(ref.revision, safe='')}?blobs=true"
        text = self._read(path, kind, ref, limit=MAX_ANSWER_BYTES)
        try:
            answer = parse_json(text)
            commit = answer["sha"]
            files = [_file(entry) for entry in answer["siblings"]]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _not_understood(ref, reason(error)) from None
        if not isinstance(commit, str) or not is_commit(commit) or len(files) > MAX_FILES:
            raise _not_understood(ref, f"commit {str(commit)[:50]!r} with {len(files)} files")
        return HubCommit(kind, ref.at(commit), {file.name: file for file in files})

    def read(self, commit: HubCommit, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file, fewer where it is shorter. The rest is not transferred."""
        folder = "" if commit.kind == "model" else f"{commit.kind}s/"
        path = f"/{folder}{commit.ref.id}/resolve/{commit.ref.revision}/{quote(name)}"
        return self._read(path, commit.kind, commit.ref, span=(begin, end), limit=end - begin)

    def _read(
        self, path: str, kind: Kind, ref: HubRef, *, limit: int, span: tuple[int, int] | None = None
    ) -> bytes:
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        try:
            with self._http.stream("GET", self._endpoint + path, headers=headers) as answer:
                if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return b""
                if answer.is_error:
                    refuse(kind, ref, answer.status_code, answer.headers.get("X-Error-Code", ""))
                skip = span[0] if span and answer.status_code != HTTPStatus.PARTIAL_CONTENT else 0
                return _first(answer, skip, limit)
        except httpx.HTTPError as error:
            raise unreachable(type(error).__name__) from error


def _first(answer: httpx.Response, skip: int, limit: int) -> bytes:
    """Bytes [skip, skip + limit) of the body."""
    body = bytearray()
    for chunk in answer.iter_bytes(1 << 16):
        body += chunk
        if len(body) >= skip + limit:
            break
    return bytes(body[skip : skip + limit])


def _file(entry: dict[str, Any]) -> HubFile:
    name = entry["rfilename"]
    if not _is_relative(name):
        raise ValueError(f"file {str(name)[:100]!r}")
    sha256 = entry["lfs"]["sha256"] if entry.get("lfs") else None
    return HubFile(name, int(entry["size"]), sha256, str(entry["blobId"]))


def _is_relative(name: Any) -> bool:
    """Whether a file's name stays in the folder of its repository."""
    return isinstance(name, str) and all(
        part not in ("", ".", "..") and not set(part) & set("\\\0") for part in name.split("/")
    )


def refuse(kind: Kind, ref: HubRef, status: int, code: str) -> NoReturn:
    """Raise what an answer with an error means for whoever named the repository."""
    if code == "RevisionNotFound":
        raise SourceError(
            "hub_revision_not_found",
            f"The {kind} {ref.id!r} has no revision {ref.revision!r}.",
            "Name a branch, a tag or a commit behind the @, or leave it out for the newest.",
        )
    if code == "GatedRepo" or status == HTTPStatus.FORBIDDEN:
        raise access_denied(kind, ref)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND):
        raise SourceError(
            "hub_repository_not_found",
            f"There is no {kind} {ref.id!r} on the Hub, or it is private.",
            "Check the name. For a private one start the server with a token in HF_TOKEN that may read it.",
        )
    raise unreachable(f"it answers with status {status}")


def access_denied(kind: Kind, ref: HubRef) -> SourceError:
    """hub_access_denied: somebody has to be let in first."""
    return SourceError(
        "hub_access_denied",
        f"The {kind} {ref.id!r} is gated, and this server's account was not let in.",
        "Accept its terms on its page, and start the server with that account's token in HF_TOKEN.",
    )


def unreachable(reason: str) -> SourceError:
    """hub_unreachable: trying again may help."""
    return SourceError(
        "hub_unreachable",
        f"The Hub cannot be reached: {reason}.",
        "Try again, or check the network and HF_ENDPOINT.",
    )


def _not_understood(ref: HubRef, what: str) -> SourceError:
    return SourceError(
        "hub_answer_invalid",
        f"The Hub's answer about {ref.id!r} is not understood: {what}.",
        "Check HF_ENDPOINT.",
    )
