"""The API in a process of its own on one core, with three routes beside Bitmill's to compare it with.

python -m benchmarks.load.server CORE PORT
"""

import os
import sys
from collections.abc import Iterator
from typing import Annotated

import uvicorn
from fastapi import Depends, Response
from pydantic_core import to_json
from sqlalchemy.orm import Session

from api.http.dependencies import Context
from api.jobs.ledger import repository
from api.main import create_app, settle
from api.observability import configure_logging
from api.settings import get_settings

EMPTY, ROW, BARE = "/compared/empty", "/compared/row/", "/compared/bare/"


def _session(context: Context) -> Iterator[Session]:
    with context.database.look() as session:
        yield session


def _row(session: Session, project_id: str, job_id: str) -> Response:
    """What GET /v1/jobs/{job_id} selects of the job, as it came."""
    found = repository.get_with_attempts(session, project_id, job_id)
    return Response(to_json(found[0]._asdict()), media_type="application/json")


def main(core: int, port: int) -> None:
    os.sched_setaffinity(0, {core})
    settings = get_settings()
    configure_logging(settings)
    app = create_app(settings)

    @app.get(EMPTY, include_in_schema=False)
    async def empty() -> Response:
        """Nothing."""
        return Response(b"{}", media_type="application/json")

    @app.get(ROW + "{project_id}/{job_id}", include_in_schema=False)
    def row(project_id: str, job_id: str, session: Annotated[Session, Depends(_session)]) -> Response:
        """The row, in the session that the route asks for."""
        return _row(session, project_id, job_id)

    @app.get(BARE + "{project_id}/{job_id}", include_in_schema=False)
    def bare(project_id: str, job_id: str, context: Context) -> Response:
        """The row, in a session that the route opens itself, as GET /v1/jobs/{job_id} does."""
        with context.database.look() as session:
            return _row(session, project_id, job_id)

    settle(app)
    uvicorn.run(app, port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
