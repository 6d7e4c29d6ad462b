"""The HTTP application."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute

import migrations
from api.database import Database
from api.http import (
    artifacts,
    batches,
    catalogue,
    health,
    jobs,
    metrics,
    problems,
    projects,
    webhooks,
    workers,
)
from api.http.dependencies import AppContext, KeyUses
from api.http.limits import LimitRequests
from api.http.openapi import ProblemAPI
from api.http.parameters import refuse_unknown
from api.http.request_context import RequestContext, name_in_logs
from api.http.threads import ThreadLimit
from api.jobs.watch import JobWatch, seqs_in
from api.metrics.registry import make_registry
from api.metrics.requests import RequestMetrics
from api.projects.rates import open_rates
from api.projects.repository import has_keys
from api.projects.service import ensure_first_key
from api.readiness import Readiness
from api.security import KeyHasher
from api.settings import Settings
from api.store.factory import open_store
from api.tracing import request_spans

GRACE_SECONDS = 5
"""For requests that are being answered, and streams that are being read, when the process shall end."""

PLANNING_THREADS = 8
"""Submissions that are planned at once. More are no faster, and others wait longer (docs/adr/0033 has
figures)."""

RESOLVER_THREADS = 4
"""Webhooks whose hosts are looked up at once. A resolver may take tens of seconds for a name that it cannot
find, and whoever makes webhooks chooses the name."""

_NEW_OBJECTS = 50_000
"""Threshold of young collections (700 by default). The objects of a request die young anyway."""

log = structlog.get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The application on these settings. Until the database is migrated, /readyz answers 503."""
    database = Database(settings.database_url)
    store = open_store(settings.store_url)
    context = AppContext(
        settings=settings,
        database=database,
        store=store,
        hasher=KeyHasher.from_settings(settings),
        key_uses=KeyUses(database),
        planning_threads=ThreadLimit(PLANNING_THREADS),
        wake_threads=ThreadLimit(1),
        resolver_threads=ThreadLimit(RESOLVER_THREADS),
        watch=JobWatch(seqs_in(database)),
        rates=open_rates(settings),
        readiness=Readiness(settings, database.engine, store),
        metrics=make_registry(database, settings.lease_seconds),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        _make_first_key(context)
        yield
        context.database.close()
        context.rates.close()

    app = ProblemAPI(
        title="Bitmill",
        summary="Compresses language models.",
        version=version("bitmill"),
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        separate_input_output_schemas=False,  # one name for one thing: Recipe, not Recipe-Input and -Output
        telemetry=request_spans(),
    )
    app.state.context = context
    problems.install(app)
    for part in (jobs, batches, artifacts, webhooks, projects, workers, catalogue):
        app.include_router(part.router, dependencies=[Depends(_before_each)])
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.add_middleware(LimitRequests, max_body_bytes=settings.max_body_bytes)
    # The last one added is the outermost.
    app.add_middleware(RequestContext, metrics=RequestMetrics(context.metrics))
    return app


def settle(app: FastAPI) -> None:
    """Call this last before serving: it takes all objects made so far out of garbage collections, and makes
    those rarer. Otherwise a full collection stops every request for 0.2 to 0.5 s now and then."""
    app.openapi()  # made at the first use, and large
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


async def _before_each(request: Request) -> None:
    """Before each route below /v1. One dependency: FastAPI takes its time for each. Async, so that it runs in
    the request's own context."""
    name_in_logs(request)
    refuse_unknown(request)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _make_first_key(context: AppContext) -> None:
    if migrations.current(context.database.engine) != migrations.head():
        log.warning("schema_stale", hint="run `bitmill db upgrade`")
        return
    with context.database.read() as session:
        if has_keys(session):
            return
    with context.database.write() as session:
        ensure_first_key(session, context.hasher, context.settings)
