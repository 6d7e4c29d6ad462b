"""An empty store in S3, and a file to put into one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.s3 import KEEPER, S3Server


@pytest.fixture
def in_s3(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty store in S3, with the credentials of one who may use it."""
    s3.use(monkeypatch, tmp_path, KEEPER)
    return f"s3://store/{tmp_path.name}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return path
