"""S3, or storage that speaks its protocol: the client, its errors, and text files kept under HF_HOME.

Endpoint and credentials are those of every AWS library: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, a profile, the
machine's role. An object is pinned by its ETag, and by its version where its bucket keeps versions: with both
a later run gets the same bytes, with the ETag alone it gets them or hears that they changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

from compression.boundary import writing
from compression.errors import SourceError

CONNECT_SECONDS = 10
READ_SECONDS = 60
ATTEMPTS = 3
"""Of one request, with growing pauses; not of a body that breaks off."""
_CONNECTIONS = 50  # as many threads as may ask at once, so that none opens a connection for one request

_CHUNK_BYTES = 1 << 20
_DAMAGED = (
    "BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
)  # fmt: skip
"""What a server answers with 400 to a body that did not arrive as it was sent."""

_FORM = re.compile(r"s3://(\w[\w.-]{1,62})/([^\x00-\x1f\x7f]{1,1024})", re.ASCII)
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

OnBytes = Callable[[int, int], None]
"""Called with the bytes that are there and those that are wanted. What it raises ends the download."""


@dataclass(frozen=True)
class S3Ref:
    """`s3://bucket/key`."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The object that a text names, None where it names none.

        Keys with empty parts, "." or ".." are none: some servers take such a key for another one.
        """
        found = _FORM.fullmatch(text)
        if found is None or {"", ".", ".."} & set(found[2].split("/")):
            return None
        return cls(found[1], found[2])

    @property
    def path(self) -> PurePosixPath:
        """The key as a path, for its name and suffix."""
        return PurePosixPath(self.key)

    def is_below(self, prefix: str) -> bool:
        """Whether it lies in `s3://bucket` or `s3://bucket/folder`. Whole parts count, as with folders."""
        return f"{self}/".startswith(f"{prefix.rstrip('/')}/")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class S3Object:
    """An object as it is at one time. version_id: None where its bucket keeps no versions. size: bytes."""

    ref: S3Ref
    etag: str
    version_id: str | None
    size: int

    def to_dict(self) -> dict[str, Any]:
        """For provenance."""
        return {"s3": str(self.ref), "etag": self.etag, "version_id": self.version_id, "size": self.size}


def fetch_object(
    ref: S3Ref, etag: str | None, version_id: str | None, home: Path, on_bytes: OnBytes
) -> tuple[Path, S3Object]:
    """An object as a local file, and what it is. etag, version_id: what it must be, where that is known.

    A pinned object that was fetched before is not asked for again, also without a network.

    Raises SourceError: s3_object_not_found, s3_access_denied, s3_unreachable, dataset_changed.
    """
    if etag is not None:
        path = _place(ref, etag, home)
        if path.exists():
            return path, S3Object(ref, etag, version_id, path.stat().st_size)
    with explained(ref):
        wanted = {"Bucket": ref.bucket, "Key": ref.key, **({"VersionId": version_id} if version_id else {})}
        answer = client().get_object(**wanted)
        with closing(answer["Body"]) as body:
            found = S3Object(ref, answer["ETag"].strip('"'), answer.get("VersionId"), answer["ContentLength"])
            if etag not in (None, found.etag):
                raise SourceError(
                    "dataset_changed",
                    f"{ref} is no longer what the job began with: its ETag was {etag}, and is {found.etag}.",
                    "Submit a new job for the new text.",
                )
            path = _place(ref, found.etag, home)
            if not path.exists():
                save(path, body, found.size, on_bytes, building=path.parent)
    return path, found


def _place(ref: S3Ref, etag: str, home: Path) -> Path:
    """The file for an object: everything that decides its bytes is in its name."""
    key = hashlib.sha256(f"{ref.key}\n{etag}".encode()).hexdigest()[:16]
    return home / "bitmill" / "s3" / ref.bucket / f"{key}{ref.path.suffix.lower()}"


def save(path: Path, body: Any, size: int, on_bytes: OnBytes, *, building: Path) -> None:
    """The file appears whole or not at all; botocore holds a body's length against what was announced.

    size: bytes, for `on_bytes`. building: the folder, on the same file system, that it is written in.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=building)
    try:
        with open(descriptor, "wb") as file:
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                with writing(path):
                    file.write(chunk)
                on_bytes(file.tell(), size)
        with writing(path):
            os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def client(
    *, connect_seconds: float = CONNECT_SECONDS, read_seconds: float = READ_SECONDS, attempts: int = ATTEMPTS
) -> Any:
    """boto3's client of S3. attempts: of one request, with growing pauses.

    Buckets are parts of the path at an endpoint of one's own: few of those have a name for each bucket.

    Raises S3Failure: the endpoint is no URL.
    """
    import boto3
    from botocore.config import Config

    own_endpoint = any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)
    config = Config(
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=_CONNECTIONS,
        signature_version="s3v4",  # botocore would sign URLs with version 2
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        user_agent_extra="bitmill",
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise S3Failure("unreachable", str(error)) from None


class S3Failure(Exception):
    """What went wrong with S3. kind: trying again may help where it is unreachable. reason: for people."""

    def __init__(self, kind: Literal["not_found", "denied", "unreachable"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@contextmanager
def failures() -> Iterator[None]:
    """Raise botocore's errors as S3Failure, which quotes nothing of a request: that has a signature."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        yield
    except ClientError as error:
        raise _refusal(error.response) from None
    except (NoCredentialsError, PartialCredentialsError):
        raise S3Failure("denied", "there are no credentials") from None
    except BotoCoreError as error:
        raise S3Failure("unreachable", type(error).__name__) from error


def _refusal(response: dict[str, Any]) -> S3Failure:
    status, code = response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]
    if status == HTTPStatus.NOT_FOUND:
        return S3Failure("not_found", code)
    denials = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    if status in denials and code not in _DAMAGED:
        return S3Failure("denied", code)
    return S3Failure("unreachable", f"it answers {status} {code}")


@contextmanager
def explained(ref: S3Ref) -> Iterator[None]:
    """What goes wrong with a source, in words and codes of ours: SourceError."""
    try:
        with failures():
            yield
    except S3Failure as failure:
        raise _source_error(ref, failure) from failure


def _source_error(ref: S3Ref, failure: S3Failure) -> SourceError:
    if failure.kind == "not_found":
        return SourceError(
            "s3_object_not_found",
            f"There is no {ref}, or not in this version ({failure.reason}).",
            "Check bucket and key, and which endpoint is asked (AWS_ENDPOINT_URL).",
        )
    if failure.kind == "denied":
        return SourceError(
            "s3_access_denied",
            f"There is no permission to read {ref}: {failure.reason}.",
            "Set credentials that may: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile.",
        )
    return SourceError(
        "s3_unreachable",
        f"The object store cannot be reached: {failure.reason}.",
        "Try again, or check the network and AWS_ENDPOINT_URL.",
    )
