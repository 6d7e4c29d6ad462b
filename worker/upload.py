"""Uploads to the store: the shard of each finished layer, and at the end the output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from api.store.base import Check, Store
from api.store.keys import artifact_key, work_key
from compression.errors import CompressionError
from worker import metrics
from worker.retry import retry_store

MANIFEST = "manifest.json"


class UploadError(CompressionError):
    """The stored bytes are not those that the engine wrote."""


def put_shard(store: Store, path: Path, job_id: str, sha256: str, check: Check) -> str:
    """Store the shard of a finished layer; it is durable when this returns. Returns its key.

    Raises:
        UploadError: `upload_corrupt`: the digest is not that of the bytes that were written.
    """
    key, size = work_key(job_id, sha256), path.stat().st_size
    if retry_store(check, store.put, key, path, check) != sha256:
        raise _corrupt(path.name)
    metrics.UPLOADED.inc(size)
    return key


def publish(
    store: Store, folder: Path, job_id: str, token: int, digests: Mapping[str, str], check: Check
) -> str:
    """Put every file below `folder` under artifacts/<job>/<token>/, the manifest last. Returns its key.

    Retries while the store is unreachable; no file is sent twice. Shards are in the store since their layers
    were finished: they get a second key, and are not sent again.

    digests: sha256 of the shards, by file name. check: what it raises ends the upload.
    """
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        check()
        name = path.relative_to(folder).as_posix()
        key = artifact_key(job_id, token, name)
        if name in digests:
            sha256 = digests[name]
            retry_store(check, store.link, work_key(job_id, sha256), key, check)
        else:
            sha256 = retry_store(check, store.put, key, path, check)
            metrics.UPLOADED.inc(path.stat().st_size)
        files.append({"name": name, "size": path.stat().st_size, "sha256": sha256})
    check()
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"job": job_id, "files": files}, indent=2) + "\n")
    key = artifact_key(job_id, token, MANIFEST)
    retry_store(check, store.put, key, manifest, check)
    return key


def copy(store: Store, folder: Path, target: str, check: Check) -> None:
    """Put what was published from `folder` below `target` in another store too, the manifest last.

    Raises:
        UploadError: `upload_corrupt`, a file is not what was published.
    """
    manifest = folder / MANIFEST
    for file in json.loads(manifest.read_text())["files"]:
        name = file["name"]
        if retry_store(check, store.put, f"{target}/{name}", folder / name, check) != file["sha256"]:
            raise _corrupt(name)
    retry_store(check, store.put, f"{target}/{MANIFEST}", manifest, check)


def remove(store: Store, folder: str, token: int) -> None:
    """Remove what the attempt with that fencing token has uploaded to a job's folder."""
    store.delete(f"{folder}/{token}")


def remove_older(store: Store, folder: str, token: int) -> None:
    """Remove what earlier attempts left that were killed in their upload; never the files of a later one."""
    store.probe()  # fails soon where the store hangs: a cancel is not to wait for it
    for older in (other for other in tokens(store, folder) if other < token):
        remove(store, folder, older)


def tokens(store: Store, folder: str) -> set[int]:
    """The fencing tokens of the attempts that have files in a job's folder."""
    names = {key.removeprefix(f"{folder}/").partition("/")[0] for key in store.list(folder)}
    return {int(name) for name in names if name.isdecimal()}  # a copy may lie beside files that are not ours


def _corrupt(name: str) -> UploadError:
    hint = "Check the worker's disk and memory, then retry the job."
    return UploadError("upload_corrupt", f"{name} differs from what the engine wrote.", hint)
