"""From credentials to a client, and from what can go wrong on the way to an exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cli.exits import Exit
from cli.output import fail, load_settings

if TYPE_CHECKING:
    from api.client import Client
    from api.client.types import FieldProblem
    from api.settings import Settings

DEFAULT_URL = "http://127.0.0.1:8080"
PATIENCE_SECONDS = 1.0
"""A person would rather hear that the server does not answer."""


@contextmanager
def server(*, as_json: bool) -> Iterator[Client]:
    """A client of the configured server. Its errors inside the block end the command with their exit code."""
    import httpx

    from api.client import ApiError, Client

    url, key = _credentials(load_settings(as_json=as_json), as_json=as_json)
    try:
        with Client(url, key, patience_seconds=PATIENCE_SECONDS) as client:
            yield client
    except ApiError as error:
        exit_code = Exit.UNREACHABLE if error.status >= 500 else Exit.REFUSED
        others = (
            _problem_text(problem) for problem in error.errors if problem["message"] not in error.detail
        )
        message = "\n".join([error.detail, *others])
        fail(exit_code, error.code, message, as_json=as_json, hint=error.hint, problems=error.errors)
    except httpx.InvalidURL as error:
        fail(Exit.USAGE, "bad_setting", f"BITMILL_URL {url}: {error}", as_json=as_json)
    except httpx.TransportError as error:
        hint = "Start one with `bitmill serve`, or set BITMILL_URL and BITMILL_API_KEY."
        fail(
            Exit.UNREACHABLE,
            "server_unreachable",
            f"{url} does not answer: {error}",
            as_json=as_json,
            hint=hint,
        )


def _problem_text(problem: FieldProblem) -> str:
    where = problem["pointer"] or problem["parameter"]
    return f"{where}: {problem['message']} {problem['hint']}".removeprefix(": ").rstrip()


def _credentials(settings: Settings, *, as_json: bool) -> tuple[str, str]:
    """URL and key: each from its setting, else from the data folder's credentials.json."""
    stored: dict[str, str] = {}
    if settings.credentials_file.exists():
        stored = json.loads(settings.credentials_file.read_text())
    url = settings.url or stored.get("url") or DEFAULT_URL
    key = settings.api_key.get_secret_value() if settings.api_key else stored.get("api_key")
    if key is None:
        message = f"There is no API key: neither BITMILL_API_KEY nor {settings.credentials_file}."
        hint = "`bitmill serve` makes one at its first start."
        fail(Exit.USAGE, "no_credentials", message, as_json=as_json, hint=hint)
    return url, key
