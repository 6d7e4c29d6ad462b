"""Publishing an output folder: every file into the store, its bytes checked there, the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from api.artifacts.store import Store, artifact_key
from compression.errors import CompressionError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


class UploadError(CompressionError):
    """The store does not hold what was put there."""


def publish(
    store: Store,
    folder: Path,
    job_id: str,
    token: int,
    digests: Mapping[str, str],
    check: Callable[[], None],
) -> str:
    """Put every file below `folder` under artifacts/<job>/<token>/ and return the manifest's key.

    digests: sha256 by file name, as far as they were told when the files were written; others are read here.
    check: called between files; whatever it raises ends the upload.

    Raises:
        UploadError: `upload_corrupt`, a stored file has not the digest that it was written with.
    """
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        check()
        name = path.relative_to(folder).as_posix()
        key = artifact_key(job_id, token, name)
        store.put(key, path)
        with store.open(key) as stored:
            sha256 = _sha256(stored)
        if sha256 != (digests.get(name) or _sha256_of(path)):
            raise UploadError(
                "upload_corrupt",
                f"{name} in the store differs from what the engine wrote.",
                "Check the worker's disk and memory, then retry the job.",
            )
        files.append({"name": name, "size": store.size(key), "sha256": sha256})
    check()
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"job": job_id, "files": files}, indent=2) + "\n")
    key = artifact_key(job_id, token, MANIFEST)
    store.put(key, manifest)
    return key


def remove(store: Store, job_id: str, token: int) -> None:
    """Remove what the attempt with that fencing token has uploaded."""
    store.delete(f"artifacts/{job_id}/{token}")


def remove_older(store: Store, job_id: str, token: int) -> None:
    """Remove what earlier attempts, killed in their upload, have left: never the work of a later one."""
    found = {int(key.split("/")[2]) for key in store.list(f"artifacts/{job_id}")}
    for older in (other for other in found if other < token):
        remove(store, job_id, older)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
