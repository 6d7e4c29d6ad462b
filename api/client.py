"""A small synchronous client of the HTTP API: for the CLI, the tests and users' own programs.

    with Client("http://127.0.0.1:8080", key) as client:
        job = client.submit({"model": "/models/llama", "dataset": "/data/texts.jsonl", "scheme": "W4A16"})
        job = client.wait(job["id"])

Answers are the API's JSON as it is: dicts with the fields of the schemas that /docs shows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

Json = dict[str, Any]

TERMINAL = ("succeeded", "failed", "cancelled", "expired")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRIES_WITHOUT_PROGRESS = 5
_PAUSE_SECONDS = 0.2


class ApiError(Exception):
    """The server refused a request, or failed on it.

    status: of HTTP. code: stable, for programs. detail, hint: for people. errors: one dict for each thing
    that is wrong, {code, message, hint, pointer, parameter}. request_id: where the server's log has more.
    """

    def __init__(
        self, status: int, code: str, detail: str, hint: str, errors: list[dict[str, str]], request_id: str
    ) -> None:
        super().__init__(f"{code}: {detail} {hint}".strip())
        self.status = status
        self.code = code
        self.detail = detail
        self.hint = hint
        self.errors = errors
        self.request_id = request_id


class DigestMismatch(Exception):
    """A downloaded file has another sha256 than the manifest names, also when fetched anew."""


class Client:
    """Talks to one server with one API key.

    Every method raises ApiError where the server answers with an error, and httpx.TransportError where it
    does not answer at all. Proxies of the environment are used, but not for a server on this machine.
    """

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = 60) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout_seconds,
            trust_env=urlsplit(url).hostname not in _LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def submit(self, body: Json, *, idempotency_key: str | None = None) -> Json:
        """Submit a job and return it. The same key and body, sent again, give the same job."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._json("POST", "/v1/jobs", json=body, headers=headers)

    def job(self, job_id: str) -> Json:
        """A job with its plan and attempts."""
        return self._json("GET", _job(job_id))

    def jobs(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        scheme: str | None = None,
        batch: str | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Json:
        """A page of jobs, the newest first: {items, next_cursor}."""
        params = _given(status=status, model=model, scheme=scheme, batch=batch, cursor=cursor, limit=limit)
        return self._json("GET", "/v1/jobs", params=params)

    def events(self, job_id: str, *, since: int = 0, limit: int = 100) -> Json:
        """A page of events after seq `since`: {items, next_since, status}."""
        return self._json("GET", f"{_job(job_id)}/events", params={"since": since, "limit": limit})

    def report(self, job_id: str) -> Json:
        """The report of a job that has one."""
        return self._json("GET", f"{_job(job_id)}/report")

    def cancel(self, job_id: str) -> Json:
        """Cancel a job and return it."""
        return self._json("POST", f"{_job(job_id)}/cancel")

    def retry(self, job_id: str) -> Json:
        """Queue a job again that did not succeed, and return it."""
        return self._json("POST", f"{_job(job_id)}/retry")

    def submit_batch(
        self, body: Json | bytes, *, name: str | None = None, idempotency_key: str | None = None
    ) -> Json:
        """Submit up to 1,000 jobs and return the batch, with every item: a job's id or why it was refused.

        body: {"jobs": [...]} or {"sweep": {...}}, or bytes: JSON Lines, the body of a job on each.
        """
        sent: dict[str, Any] = {"json": body}
        headers = _given(**{"Idempotency-Key": idempotency_key})
        if isinstance(body, bytes):
            sent = {"content": body}
            headers["Content-Type"] = "application/jsonl"
        return self._json("POST", "/v1/batches", params=_given(name=name), headers=headers, **sent)

    def batch(self, batch_id: str, *, cursor: int | None = None, limit: int = 100) -> Json:
        """A batch with its counts and a page of its items, behind the index `cursor`."""
        return self._json("GET", _batch(batch_id), params=_given(cursor=cursor, limit=limit))

    def batches(self, *, cursor: str | None = None, limit: int = 20) -> Json:
        """A page of batches, the newest first: {items, next_cursor}."""
        return self._json("GET", "/v1/batches", params=_given(cursor=cursor, limit=limit))

    def cancel_batch(self, batch_id: str) -> Json:
        """Cancel all jobs of a batch that wait or run, and return it."""
        return self._json("POST", f"{_batch(batch_id)}/cancel")

    def create_webhook(self, body: Json) -> Json:
        """Make a webhook and return it with its secret, which is shown this once."""
        return self._json("POST", "/v1/webhooks", json=body)

    def webhooks(self, *, cursor: str | None = None, limit: int = 20) -> Json:
        """A page of webhooks, the newest first: {items, next_cursor}."""
        return self._json("GET", "/v1/webhooks", params=_given(cursor=cursor, limit=limit))

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook and its log."""
        self._request("DELETE", _webhook(webhook_id))

    def ping_webhook(self, webhook_id: str) -> Json:
        """Send a webhook a message of the type ping, and return the delivery."""
        return self._json("POST", f"{_webhook(webhook_id)}/ping")

    def deliveries(
        self,
        webhook_id: str,
        *,
        status: str | None = None,
        job_id: str | None = None,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Json:
        """A page of what was sent to a webhook, the newest first: {items, next_cursor}."""
        params = _given(status=status, job_id=job_id, cursor=cursor, limit=limit)
        return self._json("GET", f"{_webhook(webhook_id)}/deliveries", params=params)

    def redeliver(self, webhook_id: str, delivery_id: str) -> Json:
        """Send a message again, and return its delivery."""
        path = f"{_webhook(webhook_id)}/deliveries/{quote(delivery_id, safe='')}/redeliver"
        return self._json("POST", path)

    def project(self) -> Json:
        """The key's project: its limits, and what of them is used."""
        return self._json("GET", "/v1/project")

    def create_key(self, name: str, scopes: Iterable[str], *, expires_at: datetime | None = None) -> Json:
        """Make a key for the project (read, submit, admin) and return it; `key` is shown this once."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at and expires_at.isoformat()}
        return self._json("POST", "/v1/keys", json=body)

    def keys(self, *, cursor: str | None = None, limit: int = 20) -> Json:
        """A page of the project's keys, the newest first: {items, next_cursor}."""
        return self._json("GET", "/v1/keys", params=_given(cursor=cursor, limit=limit))

    def revoke_key(self, key_id: str) -> None:
        """Revoke a key; from then on it is refused."""
        self._request("DELETE", f"/v1/keys/{quote(key_id, safe='')}")

    def workers(self) -> Json:
        """The workers that are alive: {items}."""
        return self._json("GET", "/v1/workers")

    def wait(self, job_id: str, *, timeout_seconds: float | None = None, poll_seconds: float = 0.5) -> Json:
        """The job once it has ended.

        Raises:
            TimeoutError: it had not ended after `timeout_seconds`.
        """
        give_up = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (job := self.job(job_id))["status"] not in TERMINAL:
            if give_up is not None and time.monotonic() > give_up:
                raise TimeoutError(f"{job_id} is still {job['status']} after {timeout_seconds} seconds")
            time.sleep(poll_seconds)
        return job

    def artifacts(self, job_id: str) -> Json:
        """The files that a job published: {job, files: [{name, size, sha256, url}]}."""
        return self._json("GET", f"{_job(job_id)}/artifacts")

    def download(self, job_id: str, name: str, path: Path) -> None:
        """Download one file to `path`, going on from what is there of it, and check its sha256.

        The server may say that the file is elsewhere, at an address that needs no key and gets none.

        Raises:
            DigestMismatch: nothing is left at `path` then.
        """
        url = f"{_job(job_id)}/artifacts/{quote(name)}"
        listed = {file["name"]: file for file in self.artifacts(job_id)["files"]}
        if name not in listed:
            self._json("GET", url)  # says so
        size, sha256 = listed[name]["size"], listed[name]["sha256"]
        for _ in range(2):  # what was there may be the rest of another file: then once more, anew
            self._fetch(url, path, size)
            if _sha256(path) == sha256:
                return
            path.unlink()
        raise DigestMismatch(f"{name} arrived with another digest than the manifest names")

    def _fetch(self, url: str, path: Path, size: int) -> None:
        """Append what is missing; a connection that breaks is taken up where it broke."""
        tries, had = 0, -1
        path.touch()
        while (have := path.stat().st_size) < size:
            tries = 1 if have > had else tries + 1
            had = have
            headers = {"Accept-Encoding": "identity"}
            if have:
                headers["Range"] = f"bytes={have}-"
            try:
                with self._http.stream("GET", url, headers=headers, follow_redirects=True) as response:
                    if response.is_error:
                        response.read()
                        raise _error(response)
                    with path.open("ab" if response.status_code == 206 else "wb") as file:
                        for chunk in response.iter_bytes():
                            file.write(chunk)
            except httpx.TransportError:
                if tries == _TRIES_WITHOUT_PROGRESS:
                    raise
                time.sleep(_PAUSE_SECONDS * tries)

    def _json(self, method: str, url: str, **options: Any) -> Json:
        answer: Json = self._request(method, url, **options).json()
        return answer

    def _request(self, method: str, url: str, **options: Any) -> httpx.Response:
        response = self._http.request(method, url, **options)
        if response.is_error:
            raise _error(response)
        return response


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _batch(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"


def _webhook(webhook_id: str) -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}"


def _given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _error(response: httpx.Response) -> ApiError:
    """The error that a problem+json answer tells; of any other answer, its status."""
    if response.headers.get("Content-Type") != "application/problem+json":
        where = response.url.copy_with(query=None)  # what opens a store is in the query
        detail = f"{where} answered {response.status_code} {response.reason_phrase}."
        if response.history:
            hint = "Try again: the address that the server gives for a file is good for some minutes."
            return ApiError(response.status_code, "store_refused", detail, hint, [], "")
        return ApiError(response.status_code, "not_bitmill", detail, "Check the server's URL.", [], "")
    body = response.json()
    return ApiError(
        response.status_code, body["code"], body["detail"], body["hint"], body["errors"], body["request_id"]
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
