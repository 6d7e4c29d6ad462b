"""What an engine reports becomes rows: its plan, its phases, its finished layers, its events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from api.database import Database
from api.jobs.queue import leases
from api.jobs.queue.leases import Lease
from api.store.base import Check, Store
from compression.events import PARTIAL_SUFFIX
from worker import upload
from worker.cache_key import CacheKey
from worker.messages import Message
from worker.retry import write_with_retry


class EngineRecorder:
    """Records one attempt's messages, each in a transaction of its own, through the fence of the lease.

    output: the folder that the engine writes, under the name with PARTIAL_SUFFIX until it is complete.
    shard_digests: sha256 of the shards of finished layers, by file name.
    cache_key: what the attempt computed before its engine started, if it did.
    """

    def __init__(self, database: Database, store: Store, lease: Lease, output: Path) -> None:
        self._database = database
        self._store = store
        self._lease = lease
        self._output = output
        self._partial = output.with_name(output.name + PARTIAL_SUFFIX)
        self.shard_digests: dict[str, str] = {}
        self.cache_key: CacheKey | None = None

    def record(self, message: Message, check: Check) -> None:
        """Record a message. Retries while store or database is away; what `check` raises ends that."""
        kind, data = message["type"], message["data"]
        if kind == "layer_solved":
            self._record_layer(data, check)
        elif not (kind == "phase_changed" and data["phase"] == "fetch"):  # the attempt records it

            def write(session: Session) -> None:
                self._write(session, kind, data)

            write_with_retry(self._database, write, check)

    def _write(self, session: Session, kind: str, data: dict[str, Any]) -> None:
        if kind == "phase_changed":
            leases.set_phase(session, self._lease, data["phase"])
        elif kind == "plan_resolved":
            leases.save_plan(session, self._lease, data["header"])
            if self.cache_key is not None and not self.cache_key.is_current():
                leases.save_cache_key(session, self._lease, None)
        else:
            leases.append_event(session, self._lease, kind, data)

    def _record_layer(self, data: dict[str, Any], check: Check) -> None:
        """First the shard, durable in the store, then the row that makes the layer finished."""
        name, sha256 = data["entry"]["file"], data["entry"]["sha256"]
        job_id = self._lease.job_id
        try:
            key = upload.put_shard(self._store, self._partial / name, job_id, sha256, check)
        except FileNotFoundError:  # the engine has completed its output meanwhile, and renamed the folder
            key = upload.put_shard(self._store, self._output / name, job_id, sha256, check)

        def write(session: Session) -> None:
            leases.record_layer(session, self._lease, data, key)

        write_with_retry(self._database, write, check)
        self.shard_digests[name] = sha256
