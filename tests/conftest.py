"""What every test shares. The environment is set before torch or Transformers can be imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.gate import Gate
    from tests.support.logs import Logged
    from tests.support.postgres import PostgresServer
    from tests.support.s3 import S3Server


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in bf16 with its tokenizer. Read only: copy it before changing it."""
    from tests.support.models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 40 documents of about 500 tiny tokens each, in the column `text`."""
    from tests.support.models import tiny_dataset

    return tiny_dataset(tmp_path_factory.mktemp("tiny_texts") / "texts.jsonl")


@pytest.fixture
def no_gradients() -> Iterator[None]:
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; tests use keys of their own."""
    from tests.support.s3 import running_s3

    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL; tests take databases of their own with `new_database`."""
    from tests.support.postgres import running_postgres

    with (
        tempfile.TemporaryDirectory(prefix="pg-") as folder,  # the path of its socket has to be short
        running_postgres(Path(folder)) as server,
    ):
        yield server


@pytest.fixture
def gate(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What stands in front of the S3 server from here on, for one who may use the bucket `store`."""
    from tests.support.gate import Gate
    from tests.support.s3 import KEEPER

    with Gate(s3.port, f"s3://store/{tmp_path.name}") as gate:
        replace(s3, url=gate.url).use(monkeypatch, tmp_path, KEEPER)
        yield gate


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Logged]:
    """Everything that is logged from here on, as JSON."""
    from tests.support.logs import logging_here

    with logging_here(tmp_path / "logging") as logged:
        yield logged
