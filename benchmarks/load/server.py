"""The API in a process of its own on one core, with two routes beside Bitmill's to compare it with.

python -m benchmarks.load.server CORE PORT
"""

from __future__ import annotations

import os
import sys

import uvicorn
from fastapi import Response
from pydantic_core import to_json

from api.dependencies import ReadSession
from api.jobs import repository
from api.main import create_app
from api.observability import configure_logging
from api.settings import get_settings

EMPTY, ROW = "/compared/empty", "/compared/row/"


def main(core: int, port: int) -> None:
    os.sched_setaffinity(0, {core})
    settings = get_settings()
    configure_logging(settings)
    app = create_app(settings)

    @app.get(EMPTY)
    async def empty() -> Response:
        """Nothing."""
        return Response(b"{}", media_type="application/json")

    @app.get(ROW + "{project_id}/{job_id}")
    def row(project_id: str, job_id: str, session: ReadSession) -> Response:
        """What GET /v1/jobs/{job_id} selects of the job, as it came."""
        found = repository.get_with_plan(session, project_id, job_id)
        assert found is not None
        return Response(to_json(found._asdict()), media_type="application/json")

    uvicorn.run(app, port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
