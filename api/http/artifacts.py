"""/v1/jobs/{job_id}/artifacts"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from api.artifacts import service
from api.artifacts.schemas import ArtifactList
from api.errors import NotFound
from api.http.codes import EVERYWHERE, documented
from api.http.dependencies import Context, Reader
from api.http.ranges import ByteRange, parse_range
from api.store.base import ObjectNotFound, Store, disposition

CHUNK_BYTES = 1 << 20

router = APIRouter(
    prefix="/v1/jobs/{job_id}/artifacts",
    tags=["artifacts"],
    responses=documented(EVERYWHERE, {404: ["job_not_found", "artifacts_not_available", "artifacts_gone"]}),
)

_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("", response_model=ArtifactList)
def list_artifacts(job_id: str, caller: Reader, context: Context) -> ArtifactList:
    """The files that a succeeded job published, with size and sha256."""
    return service.list_artifacts(context.database, context.store, caller.project_id, job_id)


@router.head("/{name:path}", include_in_schema=False)
@router.get(
    "/{name:path}",
    response_class=StreamingResponse,
    responses={
        200: {"description": "The whole file.", **_BINARY},
        206: {"description": "The part that Range asked for.", **_BINARY},
        304: {"description": "The file is the one that If-None-Match names."},
        307: {"description": "The file is at Location, an address in S3 that is good for some minutes."},
        **documented(
            {
                404: [
                    "job_not_found",
                    "artifacts_not_available",
                    "artifact_not_found",
                    "artifacts_gone",
                    "route_not_found",  # of a name with a line break
                ],
                416: ["range_not_satisfiable"],
                503: ["store_denied", "store_unreachable"],
            }
        ),
    },
)
def download_artifact(
    job_id: str,
    name: str,
    request: Request,
    caller: Reader,
    context: Context,
    range_header: Annotated[str | None, Header(alias="Range", max_length=200)] = None,
    if_range: Annotated[str | None, Header(max_length=200)] = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Response:
    """The bytes of a file. `Range` resumes a download; the ETag is the sha256.

    Where files are in S3, GET redirects there, and HEAD tells size and sha256.
    """
    store, settings = context.store, context.settings
    artifact = service.find_artifact(context.database, store, caller.project_id, job_id, name)
    etag = f'"{artifact.file.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": disposition(name),
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(artifact.file.sha256)).decode()}:",
        "X-Content-Type-Options": "nosniff",
    }
    if if_none_match is not None and etag in (tag.strip() for tag in if_none_match.split(",")):
        return Response(status_code=304, headers=headers)
    if request.method == "GET" and (url := store.url(artifact.key, name, settings.download_url_seconds)):
        return RedirectResponse(url, headers={"Cache-Control": "no-store"})
    size = _size(store, artifact.key)
    asked_range = parse_range(range_header, size) if if_range in (None, etag) else None
    part = asked_range or ByteRange(0, size - 1, size)
    if asked_range is not None:
        headers["Content-Range"] = asked_range.content_range
    headers["Content-Length"] = str(part.length)
    body = iter(()) if request.method == "HEAD" else _read(store, artifact.key, part)
    status = 200 if asked_range is None else 206
    return StreamingResponse(body, status, headers, media_type="application/octet-stream")


def _size(store: Store, key: str) -> int:
    try:
        return store.size(key)
    except ObjectNotFound as error:
        raise NotFound("artifacts_gone", "The job's files are no longer in the store.") from error


def _read(store: Store, key: str, part: ByteRange) -> Iterator[bytes]:
    with store.open(key) as file:
        file.seek(part.first)
        left = part.length
        while left > 0:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{key} ended {left} bytes early")
            left -= len(chunk)
            yield chunk
