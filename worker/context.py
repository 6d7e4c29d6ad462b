"""What the threads of a worker process share: settings, connections, scratch folder, and whether to stop."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from dataclasses import dataclass, field

from api.database import Database
from api.jobs.queue.workers import WorkerIdentity
from api.settings import Settings
from api.store.base import Store
from api.store.factory import open_store
from worker.device import device_class, gpu_bytes, host_bytes
from worker.host import Rest
from worker.scratch import Scratch


class ShuttingDown(Exception):
    """This worker process was asked to stop."""


@dataclass(frozen=True)
class WorkerContext:
    """One worker process.

    identity: its id, device class and memory. stopping: set once, when the process was asked to stop.
    rest: until when it claims no job.
    """

    settings: Settings
    identity: WorkerIdentity
    database: Database
    store: Store
    scratch: Scratch
    stopping: threading.Event = field(default_factory=threading.Event)
    rest: Rest = field(default_factory=Rest)

    @classmethod
    def open(cls, settings: Settings) -> WorkerContext:
        """Connect to database and store, and make a scratch folder under a name that no other process has."""
        name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        gpu = gpu_bytes(settings.device)
        identity = WorkerIdentity(name, device_class(settings.device, gpu), host_bytes(), gpu)
        database = Database(settings.database_url)
        scratch = Scratch(settings.scratch_dir, name)
        return cls(settings, identity, database, open_store(settings.store_url), scratch)

    def check(self) -> None:
        """Raise ShuttingDown once the process was asked to stop."""
        if self.stopping.is_set():
            raise ShuttingDown

    def close(self) -> None:
        """Remove the scratch folder and close connections. No job may be running."""
        self.scratch.close()
        self.database.close()
