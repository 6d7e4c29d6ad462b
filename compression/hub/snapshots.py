"""Whole models from the Hub, in the cache that every Hugging Face library shares (HF_HUB_CACHE).

    models--owner--name/refs/main                     a commit
                        snapshots/<commit>/<file>     links to
                        blobs/<digest>                the bytes

`huggingface_hub` downloads, and goes on where a connection broke. It compares sizes, not digests, so they are
compared here. A file that is whole is never downloaded again, whatever ended the process before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compression.boundary import writing
from compression.checkpoint.headers import INDEX_FILE
from compression.errors import SourceError
from compression.hub.client import HubClient, HubCommit, HubFile, refuse, unreachable
from compression.hub.environment import HubEnvironment
from compression.hub.references import HubRef, Kind, is_commit
from compression.hub.selection import wanted_files

OnBytes = Callable[[int, int], None]
"""Called with the bytes that are there and those that are wanted. What it raises ends the download."""


def fetch_model(ref: HubRef, environment: HubEnvironment, on_bytes: OnBytes) -> Path:
    """The folder of a model's snapshot, downloaded where it is not cached yet.

    Raises SourceError: hub_offline, hub_digest_mismatch, and what HubClient and `wanted_files` raise.
    """
    if environment.offline:
        return _cached(ref, environment)
    with HubClient(environment) as client:
        commit = client.commit("model", ref)
        files = wanted_files(
            commit.ref.id,
            commit.files,
            lambda: _download(commit, INDEX_FILE, environment, None).read_bytes(),
        )
    _download_all(commit, files, environment, on_bytes)
    remember_ref("model", ref, commit.ref.revision, environment)
    return repository_folder("model", ref, environment) / "snapshots" / commit.ref.revision


def repository_folder(kind: Kind, ref: HubRef, environment: HubEnvironment) -> Path:
    """Where the cache keeps a repository."""
    return environment.cache / f"{kind}s--{ref.id.replace('/', '--')}"


def cached_commit(kind: Kind, ref: HubRef, environment: HubEnvironment) -> str:
    """The commit that a revision stood for when it was last downloaded.

    Raises SourceError: hub_offline.
    """
    if ref.is_pinned:
        return ref.revision
    try:
        commit = (repository_folder(kind, ref, environment) / "refs" / ref.revision).read_text().strip()
    except (OSError, ValueError):  # not there, or nothing that a library wrote
        commit = ""
    if not is_commit(commit):
        raise _not_cached(kind, ref)
    return commit


def remember_ref(kind: Kind, ref: HubRef, commit: str, environment: HubEnvironment) -> None:
    """Note in the cache which commit a branch or tag stands for."""
    if not ref.is_pinned:
        path = repository_folder(kind, ref, environment) / "refs" / ref.revision
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)


def _cached(ref: HubRef, environment: HubEnvironment) -> Path:
    commit = cached_commit("model", ref, environment)
    folder = repository_folder("model", ref, environment) / "snapshots" / commit
    if not folder.is_dir():
        raise _not_cached("model", ref)
    return folder


def _not_cached(kind: Kind, ref: HubRef) -> SourceError:
    return SourceError(
        "hub_offline",
        f"The {kind} {str(ref)!r} is not in the cache, and HF_HUB_OFFLINE forbids to download it.",
        f"Fetch it where there is a network, into the same HF_HOME (hf download {ref.id} --revision "
        f"{ref.revision}), or unset HF_HUB_OFFLINE.",
    )


def _download_all(
    commit: HubCommit, files: Sequence[HubFile], environment: HubEnvironment, on_bytes: OnBytes
) -> None:
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        on_bytes(done, total)
        path = _download(commit, file.name, environment, _meter(on_bytes, done, total))
        _verify(path, file, commit)
        done += file.size
    on_bytes(done, total)


def _download(commit: HubCommit, name: str, environment: HubEnvironment, meter: type[Any] | None) -> Path:
    """One file of the snapshot, from the cache if it is there."""
    from httpx2 import HTTPError  # what huggingface_hub raises is of this class
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    with writing(environment.cache / name):
        try:
            path = hf_hub_download(
                commit.ref.id,
                name,
                repo_type=commit.kind,
                revision=commit.ref.revision,
                cache_dir=environment.cache,
                endpoint=environment.endpoint,
                token=environment.token or False,
                tqdm_class=meter,
            )
        except HfHubHTTPError as error:
            code = error.response.headers.get("X-Error-Code", "")
            refuse(commit.kind, commit.ref, error.response.status_code, code)
        except (HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # this machine's: a full disk, say
                raise
            raise unreachable(f"{name} of {commit.ref.id!r} broke off ({type(error).__name__})") from error
    return Path(path)


def _meter(on_bytes: OnBytes, before: int, total: int) -> type[Any]:
    """The class of a progress bar for `huggingface_hub`: it draws nothing, and tells how much there is, bytes
    of files `before` this one included."""
    from tqdm import tqdm

    class Meter(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self._received = initial

        def update(self, n: float | None = 1) -> None:
            self._received += int(n or 0)
            on_bytes(before + self._received, total)

    return Meter


def _verify(path: Path, file: HubFile, commit: HubCommit) -> None:
    """Compare a file with its digest; a wrong one is removed, so that the next run downloads it anew.

    Raises SourceError: hub_digest_mismatch.
    """
    found, said = _digest(path, file), file.sha256 or file.blob
    if found == said:
        return
    while path.is_symlink():
        path, link = path.parent / path.readlink(), path
        link.unlink()
    path.unlink()
    raise SourceError(
        "hub_digest_mismatch",
        f"{file.name} of {commit.ref.id!r} has the digest {found[:12]}..., the Hub says {said[:12]}....",
        "The damaged file was removed: try again. If it stays so, the mirror at HF_ENDPOINT is damaged.",
    )


def _digest(path: Path, file: HubFile) -> str:
    """sha256 of a large file; of a small one what git calls it, the sha1 of its size and content."""
    if file.sha256 is not None:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    small = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(small) + small, usedforsecurity=False).hexdigest()
