"""What the calls are made of: a request for JSON, and a list that comes in pages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from api.client.flows import Backoff, Flow, Item, Listing, Request, Send, answered

PAGE = 100


class Base:
    """Base of all groups of calls. retry_seconds: of each call."""

    retry_seconds: float

    def _get(self, path: str, waits: float = 0, **params: Any) -> Flow[Any]:
        return self._json(Request("GET", path, params, repeatable=True, waits=waits))

    def _post(self, path: str, body: Any = None, *, repeatable: bool = False, **params: Any) -> Flow[Any]:
        return self._json(Request("POST", path, params, json=body, repeatable=repeatable))

    def _json(self, request: Request) -> Flow[Any]:
        response = yield from answered(Send(request), Backoff(self.retry_seconds))
        return response.json()

    def _delete(self, path: str) -> Flow[None]:
        yield from answered(Send(Request("DELETE", path)), Backoff(self.retry_seconds))

    def _pages(self, path: str, page_size: int, **params: Any) -> Listing[Any]:
        cursor = None
        while True:
            page = yield from self._get(path, cursor=cursor, limit=page_size, **params)
            for item in page["items"]:
                yield Item(item)
            cursor = page["next_cursor"]
            if cursor is None:
                return


def in_path(*parts: str) -> str:
    """Below /v1, each part as one segment."""
    return "/".join(["/v1", *(quote(part, safe="") for part in parts)])


def idempotent(key: str | None) -> Mapping[str, str]:
    """The header that makes a request repeatable; with a key of this call's own unless one is given."""
    return {"Idempotency-Key": key or uuid.uuid4().hex}
