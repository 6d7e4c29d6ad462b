"""Idempotency: a request that is sent again with its Idempotency-Key and body gets what the first one made,
for 24 hours."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm import Session

from api import database
from api.errors import Unprocessable
from api.jobs.ledger import repository
from api.jobs.ledger.models import IdempotencyKey
from compression.errors import Problem


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that makes something. key: its Idempotency-Key, if it has one. content: what it asks for, as
    JSON and pydantic models."""

    project_id: str
    route: str
    key: str | None
    content: Any

    @cached_property
    def digest(self) -> str:
        """Equal for requests that ask for the same, however their JSON is written."""
        text = json.dumps(self.content, sort_keys=True, default=_dumped)
        return hashlib.sha256(text.encode()).hexdigest()


def _dumped(model: BaseModel) -> Any:
    return model.model_dump(mode="json")


def find(session: Session, request: IdempotentRequest) -> str | None:
    """The id of what an earlier request with the same key made, if there was one.

    Raises:
        Unprocessable: `idempotency_key_reused`, for the same key with another body.
    """
    if request.key is None:
        return None
    row = repository.find_idempotency_key(
        session, request.project_id, request.route, request.key, database.now(session)
    )
    if row is None:
        return None
    if row.body_sha256 != request.digest:
        message = "This Idempotency-Key was used for another body."
        raise Unprocessable(Problem("idempotency_key_reused", message, "Use a new key for what is new."))
    return row.resource_id


def keep(session: Session, request: IdempotentRequest, resource_id: str, now: datetime) -> str:
    """Remember what the request makes, before it is stored. Returns its id, or that of what a request with
    the same key made first.

    Raises:
        Unprocessable: `idempotency_key_reused`.
    """
    if request.key is None:
        return resource_id
    database.lock(session, f"{request.project_id} {request.route} {request.key}")
    earlier = find(session, request)
    if earlier is not None:
        return earlier
    row = IdempotencyKey(
        project_id=request.project_id,
        route=request.route,
        key=request.key,
        body_sha256=request.digest,
        resource_id=resource_id,
        created_at=now,
    )
    repository.add_idempotency_key(session, row)
    return resource_id
