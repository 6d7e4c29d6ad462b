"""/metrics"""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from api.http.dependencies import Context

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
def metrics(context: Context) -> Response:
    """For Prometheus. Needs no key, as it names nothing of anybody's."""
    return Response(generate_latest(context.metrics), media_type=CONTENT_TYPE_PLAIN_0_0_4)
