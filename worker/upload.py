"""What goes into the store: shards of finished layers as they come, and at the end the output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from api.store.base import Check, Store
from api.store.keys import artifact_key, work_key
from compression.errors import CompressionError
from worker import metrics
from worker.patience import patiently

MANIFEST = "manifest.json"


class UploadError(CompressionError):
    """What was stored is not what the engine wrote."""


def keep_shard(store: Store, path: Path, job_id: str, sha256: str, check: Check) -> str:
    """Store a finished layer's shard, durable when this returns. Returns its key.

    Raises:
        UploadError: `upload_corrupt`, the file has not the digest that it was written with.
    """
    key, size = work_key(job_id, sha256), path.stat().st_size
    if patiently(check, store.put, key, path, check) != sha256:
        raise _corrupt(path.name)
    metrics.UPLOADED.inc(size)
    return key


def publish(
    store: Store, folder: Path, job_id: str, token: int, digests: Mapping[str, str], check: Check
) -> str:
    """Put every file below `folder` under artifacts/<job>/<token>/, the manifest last. Returns its key.

    A store that is away is waited for, and no file is sent twice. Shards are in the store since their layers
    were finished, so they get a second key and are not sent at all.

    digests: their sha256 by file name. check: whatever it raises ends the upload.
    """
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        check()
        name = path.relative_to(folder).as_posix()
        key = artifact_key(job_id, token, name)
        if name in digests:
            sha256 = digests[name]
            patiently(check, store.link, work_key(job_id, sha256), key, check)
        else:
            sha256 = patiently(check, store.put, key, path, check)
            metrics.UPLOADED.inc(path.stat().st_size)
        files.append({"name": name, "size": path.stat().st_size, "sha256": sha256})
    check()
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"job": job_id, "files": files}, indent=2) + "\n")
    key = artifact_key(job_id, token, MANIFEST)
    patiently(check, store.put, key, manifest, check)
    return key


def copy(store: Store, folder: Path, target: str, check: Check) -> None:
    """Put what was published from `folder` below `target` in another store too, the manifest last.

    Raises:
        UploadError: `upload_corrupt`, a file is not what was published.
    """
    manifest = folder / MANIFEST
    for file in json.loads(manifest.read_text())["files"]:
        name = file["name"]
        if patiently(check, store.put, f"{target}/{name}", folder / name, check) != file["sha256"]:
            raise _corrupt(name)
    patiently(check, store.put, f"{target}/{MANIFEST}", manifest, check)


def remove(store: Store, folder: str, token: int) -> None:
    """Remove what the attempt with that fencing token has uploaded to a job's folder."""
    store.delete(f"{folder}/{token}")


def remove_older(store: Store, folder: str, token: int) -> None:
    """Remove what earlier attempts, killed in their upload, have left: never the work of a later one."""
    store.probe()  # an upload's first request: one that hangs would keep a cancel waiting
    for older in (other for other in tokens(store, folder) if other < token):
        remove(store, folder, older)


def tokens(store: Store, folder: str) -> set[int]:
    """The fencing tokens of the attempts that have files in a job's folder."""
    names = {key.removeprefix(f"{folder}/").partition("/")[0] for key in store.list(folder)}
    return {int(name) for name in names if name.isdecimal()}  # a copy lies among other people's files


def _corrupt(name: str) -> UploadError:
    hint = "Check the worker's disk and memory, then retry the job."
    return UploadError("upload_corrupt", f"{name} differs from what the engine wrote.", hint)
