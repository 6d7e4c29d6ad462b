"""The store in a bucket of S3, or of storage that speaks its protocol.

Where it is and who asks is what every AWS library reads from its surroundings (compression/s3/client.py).

The server checks what arrives: every object, and every part of a large one, is sent with its SHA-256, and
refused where that does not fit. So nothing that was put is read back.

A transfer that fails or is stopped removes its parts. What a killed process leaves of them is seen by nobody,
and goes by the bucket's lifecycle rule (docs/how-to.md).
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from api.store.base import (
    Check,
    ObjectNotFound,
    StoreDenied,
    StoreUnreachable,
    check_key,
    disposition,
    go_on,
    room_for,
    sha256_of,
)
from compression.s3 import client as s3

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_BYTES = 16 << 20
"""Larger objects are sent, fetched and copied in parts of this size, the largest of them in larger parts."""
BLOCK_BYTES = 4 << 20
"""What a reader asks for at once."""
_THREADS = 8
"""Requests that move bytes at one time, of all transfers of a process."""
_BUFFERED_CHUNKS = 64  # of 256 KiB, between the network and the disk
_CHECK_SECONDS = 0.2
_STOP_SECONDS = 0.5
_PROBE_SECONDS = 2.0
_DELETED_AT_ONCE = 1000  # what S3 takes
_CHECKED = {"ChecksumAlgorithm": "SHA256"}


class S3Store:
    """Objects are those of `bucket` whose keys begin with `prefix`, which is empty or ends with a slash."""

    def __init__(self, bucket: str, prefix: str) -> None:
        from s3transfer.manager import TransferConfig, TransferManager

        self._bucket = bucket
        self._prefix = prefix
        with _store_errors(bucket):
            self._client = s3.client()
        config = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_request_concurrency=_THREADS,
            max_io_queue_size=_BUFFERED_CHUNKS,
        )
        self._transfers = TransferManager(self._client, config)

    def put(self, key: str, path: Path, check: Check = go_on) -> str:
        name = self._name(key)
        sha256 = sha256_of(path, check)
        with _store_errors(key):
            _wait(lambda end: self._transfers.upload(str(path), self._bucket, name, _CHECKED, [end]), check)
        return sha256

    def get(self, key: str, path: Path, check: Check = go_on) -> None:
        name = self._name(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with room_for(path), _store_errors(key):
            _wait(lambda end: self._transfers.download(self._bucket, name, str(path), None, [end]), check)

    def link(self, src_key: str, dst_key: str, check: Check = go_on) -> None:
        source = {"Bucket": self._bucket, "Key": self._name(src_key)}
        name = self._name(dst_key)
        with _store_errors(src_key):
            _wait(lambda end: self._transfers.copy(source, self._bucket, name, _CHECKED, [end]), check)

    def open(self, key: str) -> BinaryIO:
        return io.BufferedReader(_Ranges(self.size(key), lambda *part: self._read(key, *part)), BLOCK_BYTES)

    def url(self, key: str, name: str, seconds: int) -> str:
        with _store_errors(key):
            address: str = self._client.generate_presigned_url(
                "get_object",
                Params={
                    **self._object(key),
                    "ResponseContentDisposition": disposition(name),
                    "ResponseContentType": "application/octet-stream",
                },
                ExpiresIn=seconds,
            )
        return address

    def size(self, key: str) -> int:
        with _store_errors(key):
            size: int = self._client.head_object(**self._object(key))["ContentLength"]
        return size

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectNotFound:
            return False
        return True

    def list(self, prefix: str) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        with _store_errors(prefix):
            found = [
                entry["Key"].removeprefix(self._prefix)
                for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._name(prefix)}/")
                for entry in page.get("Contents", ())
            ]
        return iter(sorted(found))

    def delete(self, prefix: str) -> None:
        names = [{"Key": self._name(key)} for key in (prefix, *self.list(prefix))]
        for start in range(0, len(names), _DELETED_AT_ONCE):
            objects = {"Objects": names[start : start + _DELETED_AT_ONCE], "Quiet": True}
            with _store_errors(prefix):
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=objects)
            for error in answer.get("Errors", ()):
                refused = StoreDenied if error["Code"] == "AccessDenied" else StoreUnreachable
                raise refused(f"it does not delete {error['Key']}: {error['Code']}")

    def probe(self) -> None:
        try:
            with _store_errors(self._bucket):
                self._prober.head_bucket(Bucket=self._bucket)
        except ObjectNotFound:
            raise StoreDenied(f"there is no bucket {self._bucket}") from None

    @cached_property
    def _prober(self) -> Any:
        return s3.client(connect_seconds=_PROBE_SECONDS, read_seconds=_PROBE_SECONDS, attempts=1)

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._name(key)}

    def _read(self, key: str, first: int, length: int) -> bytes:
        with _store_errors(key):
            part = f"bytes={first}-{first + length - 1}"
            data: bytes = self._client.get_object(**self._object(key), Range=part)["Body"].read()
        return data


class _Ranges(io.RawIOBase):
    """An object of `size` bytes, of which read(first, length) gives a part."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._read = read
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        data = self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._size)

    def _next(self, most: int) -> bytes:
        length = min(most, self._size - self._position)
        if length <= 0:
            return b""
        data = self._read(self._position, length)
        self._position += len(data)
        return data


class _End:
    """Set when a transfer ends. s3transfer's own futures have no wait with a time limit."""

    def __init__(self) -> None:
        self.came = threading.Event()

    def on_done(self, **_of_what: Any) -> None:
        self.came.set()


def _wait(start: Callable[[_End], Any], check: Check) -> None:
    """See a transfer through to its end.

    One that is stopped is given a moment to remove its parts. It may do so later: a server that hangs would
    keep the caller waiting.
    """
    end = _End()
    transfer = start(end)
    try:
        while not end.came.wait(_CHECK_SECONDS):
            check()
    except BaseException:
        transfer.cancel()
        end.came.wait(_STOP_SECONDS)
        raise
    transfer.result()


@contextmanager
def _store_errors(key: str) -> Iterator[None]:
    """Raise what goes wrong as errors of a store. A missing bucket is not a missing object: it is
    StoreDenied."""
    from s3transfer.exceptions import RetriesExceededError

    try:
        with s3.failures():
            yield
    except RetriesExceededError as error:  # of a body that breaks off
        raise StoreUnreachable(type(error.last_exception).__name__) from error
    except s3.S3Failure as failure:
        if failure.kind == "not_found" and failure.reason != "NoSuchBucket":
            raise ObjectNotFound(key) from failure
        if failure.kind == "unreachable":
            raise StoreUnreachable(failure.reason) from failure
        raise StoreDenied(failure.reason) from failure
