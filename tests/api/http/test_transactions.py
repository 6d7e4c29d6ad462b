"""A transaction ends in the function that opened it: none is open while an answer is made (docs/adr/0033).

Every test that uses the fixture `server` checks it of every request that it makes.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from api import database as module
from api.database import AWAY, Database
from api.http.dependencies import Context, KeyUses
from api.main import create_app
from api.projects.models import Project
from api.projects.rates import Minute
from api.settings import Settings
from api.write_queue import WriteQueue
from tests.api.conftest import Server
from tests.support.transactions import kept_while_answering


def calls_of(dependant: Dependant) -> Iterator[Any]:
    """What FastAPI calls for a route, with everything that its dependencies ask for."""
    for each in dependant.dependencies:
        yield each.call
        yield from calls_of(each)


def is_ours(route: RouteContext) -> bool:
    """Whether FastAPI solves dependencies for it: not the pages of the document."""
    return isinstance(getattr(route, "dependant", None), Dependant)


def kept_session(context: Context) -> Iterator[Session]:
    with context.database.read() as session:
        yield session


KeptSession = Annotated[Session, Depends(kept_session, scope="function")]


def ends_later(call: Any) -> bool:
    """Whether FastAPI goes on with it after the route returned."""
    functions = (call, getattr(call, "__call__", None))  # noqa: B004
    return any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in functions)


def test_no_route_has_a_dependency_that_ends_after_it(settings: Settings) -> None:
    app = create_app(settings)
    routes = {route.path: route.dependant for route in iter_route_contexts(app.routes) if is_ours(route)}
    assert len(routes) > 20
    assert [path for path, dependant in routes.items() if any(map(ends_later, calls_of(dependant)))] == []
    app.state.context.database.close()


def test_a_transaction_that_is_open_while_an_answer_is_made_is_found(settings: Settings) -> None:
    app = create_app(settings)

    @app.get("/dependency")
    def with_a_session(session: KeptSession) -> dict[str, int]:
        return {"projects": session.scalar(select(func.count()).select_from(Project)) or 0}

    @app.get("/block")
    def with_a_block(context: Context) -> dict[str, int]:
        with context.database.read() as session:
            return {"projects": session.scalar(select(func.count()).select_from(Project)) or 0}

    (route,) = (route for route in iter_route_contexts(app.routes) if route.path == "/dependency")
    assert any(map(ends_later, calls_of(route.dependant)))
    with kept_while_answering(app) as found, TestClient(app) as http:
        assert http.get("/block").json() == {"projects": 1}
        assert found == []
        assert http.get("/dependency").json() == {"projects": 1}
        assert len(found) == 1


def test_no_connection_is_held_while_requests_are_counted(settings: Settings, server: Server) -> None:
    """Whatever counts them may be away, for a quarter of a second each."""
    job = server.submit()
    app = create_app(settings.model_copy(update={"requests_per_minute": 1000}))
    pool = app.state.context.database.engine.pool
    held = list[int]()

    class Rates:
        def count(self, _project_id: str) -> Minute:
            held.append(pool.checkedout())
            return Minute(1, 60)

        def close(self) -> None:
            pass

    app.state.context = dataclasses.replace(app.state.context, rates=Rates())
    with TestClient(app, headers=server.http.headers) as http:
        for path in ("/v1/jobs", f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}?wait=1"):
            assert http.get(path).status_code == 200
    app.state.context.database.close()
    assert held == [0, 0, 0]


def test_writers_take_turns_in_the_order_in_which_they_came() -> None:
    queue, order = WriteQueue(), list[int]()
    assert queue.acquire(0)

    def write(number: int) -> None:
        assert queue.acquire(10)
        order.append(number)
        queue.release()

    threads = [threading.Thread(target=write, args=[number]) for number in range(20)]
    for number, thread in enumerate(threads):
        thread.start()
        give_up = time.monotonic() + 10
        while len(queue._waiting) <= number:
            assert time.monotonic() < give_up
            time.sleep(0.001)
    assert not queue.acquire(0)
    queue.release()
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert queue.acquire(0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_turn_ends_with_its_transaction_whatever_happens(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_WAIT_SECONDS", 0.1)

    def wait_for_a_turn() -> None:
        with other.write() as session:
            session.execute(select(1))

    other = Database(database.engine.url.render_as_string())  # one process may have several of one file
    with database.write() as session:
        session.execute(select(1))
        with pytest.raises(AWAY, match="other writers"):
            wait_for_a_turn()
    with pytest.raises(AWAY), database.write() as session:
        session.execute(text("SELECT no_such_function()"))
    with database.write() as session:
        session.execute(select(1))
        session.connection().invalidate()
        session.rollback()
    wait_for_a_turn()
    with database.read() as session:
        session.execute(select(1))
        wait_for_a_turn()
    other.close()


def test_of_requests_at_once_one_notes_that_their_key_was_used(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, noted = threading.Event(), threading.Event(), list[str]()

    def note_use(_session: Session, key_id: str) -> None:
        noted.append(key_id)
        began.set()
        assert go_on.wait(10)

    monkeypatch.setattr("api.projects.repository.note_use", note_use)
    uses = KeyUses(database)
    first = threading.Thread(target=uses.note, args=["key"])
    first.start()
    assert began.wait(10)
    uses.note("key")
    go_on.set()
    first.join()
    assert noted == ["key"]
    uses.note("key")
    assert noted == ["key", "key"]
