"""Whether this server can work: checks of everything that it needs, each with a time limit."""

from __future__ import annotations

import asyncio
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

import migrations
from api.errors import Unavailable
from api.probes import Probe
from api.schemas import all_required
from api.settings import Settings
from api.store.base import Store, StoreUnavailable

CHECK_SECONDS = 2.0
"""Time limit of a check. They run in parallel, so an answer takes no longer."""

log = structlog.get_logger(__name__)


class Check(BaseModel):
    """What one part answered. With a warning the server is ready all the same."""

    model_config = ConfigDict(json_schema_extra=all_required)

    name: str
    status: Literal["ok", "warning", "failed"]
    code: str = ""
    message: str = ""
    hint: str = ""


class Readiness:
    """The checks of one server."""

    def __init__(self, settings: Settings, engine: Engine, store: Store) -> None:
        self._probes = (
            Probe("database", lambda: check_schema(engine)),
            Probe("store", lambda: _check_store(store)),
        )
        self._broker = (
            None if settings.embedded else Probe("broker", lambda: _check_broker(settings.broker_url))
        )

    async def examine(self) -> list[Check]:
        """What every part answers: `database`, `store` and, where it is none of this process, `broker`."""
        checks = [_ask(probe, "failed") for probe in self._probes]
        if self._broker is not None:  # without it jobs are accepted all the same, and workers find them
            checks.append(_ask(self._broker, "warning"))
        return await asyncio.gather(*checks)


async def _ask(probe: Probe[str], otherwise: Literal["warning", "failed"]) -> Check:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            message = await asyncio.wrap_future(probe.begin())
    except Unavailable as error:
        found = error
    except TimeoutError:
        found = Unavailable(
            f"{probe.name}_unavailable",
            f"The {probe.name} did not answer within {CHECK_SECONDS:g} seconds.",
            f"Look at the {probe.name}, and at the network on the way there.",
        )
    else:
        return Check(name=probe.name, status="ok", message=message)
    log.warning("not_ready", check=probe.name, code=found.code, reason=found.message)
    return Check(name=probe.name, status=otherwise, code=found.code, message=found.message, hint=found.hint)


def check_schema(engine: Engine) -> str:
    """Say which revision the schema is at.

    Raises:
        Unavailable: `database_unavailable`; `schema_stale`, `schema_newer` for one that is not this code's.
    """
    try:
        current = migrations.current(engine)
    except SQLAlchemyError as error:
        log.error("database_unavailable", error=str(error))
        message = "The database does not answer."
        raise Unavailable("database_unavailable", message, "Look at BITMILL_DATABASE_URL.") from error
    needed = migrations.head()
    if current == needed:
        return f"The schema is {current}."
    if current is None:
        message = f"The database has no schema, this server needs {needed}."
        raise Unavailable("schema_stale", message, "Run `bitmill db upgrade`.")
    if current in migrations.known():
        message = f"The database's schema is at {current}, this server needs {needed}."
        raise Unavailable("schema_stale", message, "Run `bitmill db upgrade`.")
    message = f"The database's schema is at {current}, which is newer than the {needed} of this server."
    raise Unavailable("schema_newer", message, "Run the version of Bitmill that upgraded it, or a later one.")


def _check_store(store: Store) -> str:
    try:
        store.probe()
    except StoreUnavailable as error:
        raise Unavailable("store_unavailable", error.message, error.hint) from error
    return "The store answers."


def _check_broker(url: str) -> str:
    try:
        with Redis.from_url(
            url,
            socket_connect_timeout=CHECK_SECONDS,
            socket_timeout=CHECK_SECONDS,
            retry=Retry(NoBackoff(), 0),
        ) as broker:
            broker.ping()
    except RedisError as error:
        message = f"The broker does not answer: {type(error).__name__}."
        hint = "Jobs wait for the workers' next sweep. Look at BITMILL_BROKER_URL."
        raise Unavailable("broker_unavailable", message, hint) from error
    return "The broker answers."
