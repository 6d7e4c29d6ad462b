"""API keys: how they look, how they are kept, and which scopes they may have.

A key is `bitmill_`, 32 random characters and a checksum of 6: a mistyped key is told apart without the
database, and a leaked one is easy to search for. The database keeps HMAC-SHA256 of the key under the server's
secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import string
import zlib
from enum import StrEnum
from pathlib import Path

from api.private import make_folder, opener
from api.settings import Settings

PREFIX = "bitmill_"
_ALPHABET = string.ascii_letters + string.digits
_RANDOM_LENGTH = 32
_CHECKSUM_LENGTH = 6
_SECRET_FILE = "secret.key"


class Scope(StrEnum):
    """What a key may do: read; submit (and read); admin (everything)."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


def new_key() -> str:
    """A fresh API key, to be shown once."""
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))
    return PREFIX + body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Whether the checksum fits: a mistyped or cut key is not even looked up."""
    body = key.removeprefix(PREFIX)
    random, checksum = body[:_RANDOM_LENGTH], body[_RANDOM_LENGTH:]
    return key.startswith(PREFIX) and hmac.compare_digest(checksum.encode(), _checksum(random).encode())


def _checksum(body: str) -> str:
    number = zlib.crc32(body.encode())
    letters = []
    for _ in range(_CHECKSUM_LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[index])
    return "".join(letters)


class KeyHasher:
    """Turns a key into the digest that the database keeps."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    def from_settings(cls, settings: Settings) -> KeyHasher:
        """With the configured secret, else that of <data>/secret.key, which is made at the first call."""
        if settings.secret_key is not None:
            return cls(settings.secret_key.get_secret_value().encode())
        return cls(_read_or_make(settings.data_dir / _SECRET_FILE))

    def digest(self, key: str) -> str:
        """HMAC-SHA256, hexadecimal."""
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with open(temporary, "xb", opener=opener) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_or_make(path: Path) -> bytes:
    """The secret in that file. Of several processes that start at once, one makes it and all use that one."""
    if not path.exists():
        candidate = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_private(candidate, secrets.token_hex(32).encode())
        try:
            os.link(candidate, path)
        except FileExistsError:
            pass
        finally:
            candidate.unlink()
    return path.read_bytes()
