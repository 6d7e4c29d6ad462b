"""The store that a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from api.store.base import Store, StoreError
from api.store.local import LocalStore
from api.store.s3 import S3Store
from compression.s3.client import S3Ref


def open_store(url: str) -> Store:
    """The store of that URL: `file://` and an absolute path, or `s3://bucket` or `s3://bucket/folder`.

    Raises:
        StoreError: `unknown_store`.
        StoreDenied: the folder cannot be made.
        StoreUnreachable: the address of the S3 server is none.
    """
    folder = local_folder(url)
    if folder is not None:
        return LocalStore(folder)
    inside = S3Ref.parse(f"{url.rstrip('/')}/key")
    if inside is not None:
        return S3Store(inside.bucket, inside.key.removesuffix("key"))
    hint = "Give file:// and an absolute path, or s3://bucket/folder."
    raise StoreError("unknown_store", f"{url!r} is not a store.", hint)


def local_folder(url: str) -> Path | None:
    """The folder of the store of that URL, None where it is in S3 or no store."""
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return Path(unquote(parts.path))
    return None
