"""Models in S3: the objects directly below `s3://bucket/folder/`, pinned by their names, sizes and ETags.

    HF_HOME/bitmill/s3/<bucket>/<hash of the folder>/<revision>/<file>    each whole or not there
                                                     <revision>.whole     there once all files are
    HF_HOME/bitmill/headers/s3/<bucket>/<hash of the folder>/<revision>/  what planning reads

Every GET says which ETag it means: an object that changes meanwhile is noticed, and never mixed with others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from compression.boundary import writing
from compression.checkpoint.headers import INDEX_FILE, MAX_HEADER_BYTES
from compression.errors import SourceError
from compression.hub.headers import kept, write_headers
from compression.hub.selection import wanted_files
from compression.s3.client import OnBytes, S3Ref, client, explained, save

MAX_OBJECTS = 10_000
"""Directly below a folder, folders included."""
_MAX_NAME_BYTES = 255  # of a file on Linux
_REVISION = re.compile(r"[0-9a-f]{64}")
_PLANNING_SECONDS = 10  # a request waits


@dataclass(frozen=True)
class S3ModelRef:
    """`s3://bucket/folder`, or `s3://bucket/folder@revision` for one state of it.

    revision: hex SHA-256 of the names, sizes and ETags of the files that are wanted.
    """

    folder: S3Ref
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The reference that a text is, None where it is none. Only 64 hex digits after an @ are a revision:
        names of folders may have an @ too."""
        place, _, revision = text.rpartition("@")
        if _REVISION.fullmatch(revision) is None:
            place, revision = text, ""
        folder = S3Ref.parse(place.removesuffix("/"))
        return None if folder is None else cls(folder, revision or None)

    @property
    def name(self) -> str:
        """The last part of the folder."""
        return self.folder.path.name

    def at(self, revision: str) -> Self:
        """The same folder at a revision."""
        return type(self)(self.folder, revision)

    def __str__(self) -> str:
        return str(self.folder) if self.revision is None else f"{self.folder}@{self.revision}"


@dataclass(frozen=True)
class S3File:
    """An object below a folder, by its name there. size: bytes."""

    name: str
    size: int
    etag: str


def s3_header_folder(ref: S3ModelRef, home: Path) -> tuple[Path, S3ModelRef]:
    """A folder to plan from, and the pinned model: what is downloaded already, or headers alone, which are
    kept under HF_HOME.

    Raises SourceError: model_not_found, model_changed, too_many_files, s3_object_not_found, s3_access_denied,
    s3_unreachable, and what `wanted_files` raises.
    """
    if _is_downloaded(ref, home):
        return _place(ref, home), ref
    with explained(ref.folder):
        s3 = client(read_seconds=_PLANNING_SECONDS, attempts=2)
    pinned, files = _find(s3, ref)
    by_name = {file.name: file for file in files}

    def read(name: str, begin: int, end: int) -> bytes:
        return _read(s3, ref.folder, by_name[name], begin, end)

    fill = partial(write_headers, model=str(ref.folder), files=files, read=read)
    return kept(_place(pinned, home, "headers/s3"), fill), pinned


def fetch_s3_model(ref: S3ModelRef, home: Path, on_bytes: OnBytes) -> tuple[Path, S3ModelRef]:
    """The folder of a model, downloaded where it is not kept yet, and the pinned model. A pinned one that is
    whole needs no network.

    Raises SourceError: as `s3_header_folder`.
    """
    if _is_downloaded(ref, home):
        return _place(ref, home), ref
    with explained(ref.folder):
        s3 = client()
    pinned, files = _find(s3, ref)
    folder = _place(pinned, home)
    total, done = sum(file.size for file in files), 0
    for file in files:
        on_bytes(done, total)
        if not (folder / file.name).exists():
            _download(s3, ref.folder, file, folder, partial(_add, on_bytes, done, total))
        done += file.size
    on_bytes(done, total)
    with writing(folder):
        _mark(folder).touch()
    return folder, pinned


def _find(s3: Any, ref: S3ModelRef) -> tuple[S3ModelRef, list[S3File]]:
    """A model as it is now: pinned, and the files of it that are wanted."""
    files = _listed(s3, ref.folder)
    if "config.json" not in files:
        raise SourceError(
            "model_not_found",
            f"There is no config.json in {ref.folder}.",
            "Give the folder that holds config.json and the safetensors files.",
        )
    wanted = wanted_files(
        str(ref.folder), files, lambda: _read(s3, ref.folder, files[INDEX_FILE], 0, MAX_HEADER_BYTES)
    )
    state = json.dumps(sorted((file.name, file.size, file.etag) for file in wanted))
    revision = hashlib.sha256(state.encode()).hexdigest()
    if ref.revision not in (None, revision):
        raise _changed(ref.folder)
    return ref.at(revision), wanted


def _listed(s3: Any, folder: S3Ref) -> dict[str, S3File]:
    """The objects directly below a folder whose names can be those of files, by name."""
    files: dict[str, S3File] = {}
    seen = 0
    pages = s3.get_paginator("list_objects_v2")
    with explained(folder):
        for page in pages.paginate(Bucket=folder.bucket, Prefix=f"{folder.key}/", Delimiter="/"):
            objects = page.get("Contents", ())
            seen += len(objects) + len(page.get("CommonPrefixes", ()))
            if seen > MAX_OBJECTS:
                raise SourceError(
                    "too_many_files",
                    f"There are more than {MAX_OBJECTS} objects and folders in {folder}.",
                    "Give the model's own folder.",
                )
            for each in objects:
                name = each["Key"].removeprefix(f"{folder.key}/")
                if _is_plain(folder, name):
                    files[name] = S3File(name, each["Size"], each["ETag"].strip('"'))
    return files


def _is_plain(folder: S3Ref, name: str) -> bool:
    fits = len(name.encode()) <= _MAX_NAME_BYTES and not set(name) & set("/\\")
    return fits and S3Ref.parse(f"{folder}/{name}") is not None


def _read(s3: Any, folder: S3Ref, file: S3File, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file, fewer where it is shorter."""
    end = min(end, file.size)
    if begin >= end:
        return b""
    with _opened(s3, folder, file, {"Range": f"bytes={begin}-{end - 1}"}) as body:
        content: bytes = body.read()
        return content


def _download(s3: Any, folder: S3Ref, file: S3File, into: Path, on_bytes: OnBytes) -> None:
    """What is built lies beside the model: a file that a kill left half done is none of the model's."""
    with writing(into):
        into.mkdir(parents=True, exist_ok=True)
    with _opened(s3, folder, file, {}) as body:
        save(into / file.name, body, file.size, on_bytes, building=into.parent)


@contextmanager
def _opened(s3: Any, folder: S3Ref, file: S3File, span: dict[str, str]) -> Iterator[Any]:
    """The body of a file, or of a span of it, if it is still what was listed."""
    from botocore.exceptions import ClientError

    ref = S3Ref(folder.bucket, f"{folder.key}/{file.name}")
    with explained(ref):
        try:
            answer = s3.get_object(Bucket=ref.bucket, Key=ref.key, IfMatch=f'"{file.etag}"', **span)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND):
                raise _changed(folder) from None
            raise
        with closing(answer["Body"]) as body:
            yield body


def _place(ref: S3ModelRef, home: Path, kind: str = "s3") -> Path:
    """Where a pinned model's files are kept, or what else of it."""
    folder = hashlib.sha256(ref.folder.key.encode()).hexdigest()[:16]
    return home / "bitmill" / kind / ref.folder.bucket / folder / str(ref.revision)


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.whole")


def _is_downloaded(ref: S3ModelRef, home: Path) -> bool:
    return ref.revision is not None and _mark(_place(ref, home)).exists()


def _add(on_bytes: OnBytes, before: int, total: int, received: int, _size: int) -> None:
    """Tell of the bytes of one file as part of all."""
    on_bytes(before + received, total)


def _changed(folder: S3Ref) -> SourceError:
    return SourceError(
        "model_changed",
        f"{folder} is no longer what it was: objects in it were changed, added or removed.",
        "Submit a new job for the model as it is now.",
    )
