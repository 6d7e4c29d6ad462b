"""What a call may raise, beside httpx.TransportError where no server answers."""

from __future__ import annotations

import httpx

from api.client.types import FieldProblem

_MEDIA_TYPE = "application/problem+json"


class ApiError(Exception):
    """The server refused a request, or failed on it.

    status: of HTTP. code: stable, for programs. detail, hint: for people. errors: everything that is wrong,
    and where. request_id: where the server's log has more.
    """

    def __init__(
        self, status: int, code: str, detail: str, hint: str, errors: list[FieldProblem], request_id: str
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


def error_of(response: httpx.Response) -> ApiError:
    """The error that a problem+json answer tells; of any other answer, its status."""
    if response.headers.get("Content-Type") == _MEDIA_TYPE:
        said = response.json()
        return ApiError(
            response.status_code,
            said["code"],
            said["detail"],
            said["hint"],
            said["errors"],
            said["request_id"],
        )
    where = response.url.copy_with(query=None)  # what opens a store is in the query
    detail = f"{where} answered {response.status_code} {response.reason_phrase}."
    if response.history:
        hint = "Try again: the address that the server gives for a file is good for some minutes."
        return ApiError(response.status_code, "store_refused", detail, hint, [], "")
    return ApiError(response.status_code, "not_bitmill", detail, "Check the server's URL.", [], "")
