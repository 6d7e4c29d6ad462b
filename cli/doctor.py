"""Checks what a server and a worker need, and says what to do about what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

import migrations
from api.data_dir import examine_data_dir
from api.database import make_engine
from api.private import make_folder
from api.settings import Settings
from api.store.factory import open_store
from cli.formats import bytes_text
from compression.errors import CompressionError

Status = Literal["ok", "warning", "failed"]

LOW_DISK_BYTES = 10 << 30
TORCH_SECONDS = 120
BROKER_SECONDS = 3

# Another process: the command itself stays without torch, and an import that crashes is a finding.
_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": gpus, "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True)
class Check:
    """One finding. hint: what to do, where there is something to do."""

    name: str
    status: Status
    message: str
    hint: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(settings: Settings) -> Iterator[Check]:
    """All checks, in the order in which one depends on the other."""
    checks: tuple[Callable[[Settings], Check], ...] = (
        _python,
        _torch,
        _data_dir,
        _disk,
        _database,
        _broker,
        _store,
        _roots,
    )
    for check in checks:
        yield check(settings)


def _python(_settings: Settings) -> Check:
    return Check(
        "python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    )


def _torch(_settings: Settings) -> Check:
    """torch in this interpreter: there is none in an installation that only serves the API."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Check("torch", "failed", f"does not import within {TORCH_SECONDS} s")
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        if last == "ModuleNotFoundError: No module named 'torch'":
            return Check(
                "torch", "warning", "not installed", "This machine can serve the API, but run no jobs."
            )
        return Check("torch", "failed", f"cannot be imported: {last}")
    try:
        found = json.loads(answer.stdout.strip().splitlines()[-1])  # after what libraries print
    except (ValueError, IndexError):
        return Check("torch", "failed", f"said what is no answer: {answer.stdout[-200:]!r}")
    where = ", ".join(found["gpus"]) or f"no GPU, {found['threads']} threads on the CPU"
    return Check("torch", "ok", f"{found['version']}, {where}")


def _data_dir(settings: Settings) -> Check:
    folder = settings.data_dir
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("data folder", "failed", f"{folder}: {error.strerror}", "Set BITMILL_DATA_DIR.")
    warning = examine_data_dir(settings).warning
    if warning is not None:
        return Check("data folder", "warning", warning)
    return Check("data folder", "ok", str(folder))


def _disk(settings: Settings) -> Check:
    folder = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    message = f"{bytes_text(free)} free where the data folder is"
    if free < LOW_DISK_BYTES:
        return Check(
            "disk", "warning", message, "A job needs room for its output, twice while it is uploaded."
        )
    return Check("disk", "ok", message)


def _database(settings: Settings) -> Check:
    try:
        engine = make_engine(settings.database_url)
        revision = migrations.current(engine)
        engine.dispose()
    except (SQLAlchemyError, OSError, ValueError) as error:
        return Check("database", "failed", str(error).splitlines()[0], "Look at BITMILL_DATABASE_URL.")
    head = migrations.head()
    if revision == head:
        return Check("database", "ok", f"schema {revision}")
    if revision is not None and revision not in migrations.known():
        message = f"is at schema {revision}, which is newer than the {head} of this code"
        return Check("database", "failed", message, "Run the version of Bitmill that upgraded it.")
    state = "has no schema yet" if revision is None else f"is at schema {revision}, this code needs {head}"
    # An embedded server migrates by itself when it starts.
    status: Status = "warning" if settings.embedded else "failed"
    return Check("database", status, state, "Run: bitmill db upgrade")


def _broker(settings: Settings) -> Check:
    if settings.embedded:
        return Check("broker", "ok", "in the server's own process (memory://)")
    from redis import Redis, RedisError

    try:
        with Redis.from_url(settings.broker_url, socket_connect_timeout=BROKER_SECONDS) as broker:
            version = broker.info("server")["redis_version"]
    except (RedisError, OSError, ValueError) as error:
        return Check("broker", "failed", f"does not answer: {error}", "Look at BITMILL_BROKER_URL.")
    return Check("broker", "ok", f"answers, speaks Redis {version}")


def _store(settings: Settings) -> Check:
    """Put a small object, read it back, remove it."""
    key, content = f"doctor/{uuid.uuid4().hex}", os.urandom(64)
    try:
        store = open_store(settings.store_url)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "object"
            file.write_bytes(content)
            store.put(key, file)
        with store.open(key) as stored:
            same = stored.read() == content
        store.delete(key)
    except (CompressionError, OSError) as error:
        return Check("store", "failed", f"{settings.store_url}: {error}", "Look at BITMILL_STORE_URL.")
    if not same:
        return Check("store", "failed", f"{settings.store_url} gave back other bytes than it was given")
    return Check("store", "ok", settings.store_url)


def _roots(settings: Settings) -> Check:
    missing = [str(root) for root in settings.local_roots if not root.is_dir()]
    if missing:
        return Check("local roots", "failed", f"no folder: {', '.join(missing)}", "Set BITMILL_LOCAL_ROOTS.")
    if not settings.local_roots:
        hint = "Jobs can name no local model until BITMILL_LOCAL_ROOTS is set."
        return Check("local roots", "warning", "none", hint)
    return Check("local roots", "ok", ", ".join(map(str, settings.local_roots)))
