"""A client of the configured server, and the exit codes of its errors."""

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

RETRY_SECONDS = 1.0
"""How long a call is tried again. A person would rather hear that the server does not answer."""
UNREACHABLE_HINT = "Start one with `bitmill serve`, or set BITMILL_URL and BITMILL_API_KEY."


@contextmanager
def server(*, as_json: bool) -> Iterator[Client]:
    """A client of the configured server. Its errors inside the block end the command with their exit code."""
    import httpx

    from api.client import ApiError, Client

    url, key = _credentials(load_settings(as_json=as_json), as_json=as_json)
    try:
        with Client(url, key, retry_seconds=RETRY_SECONDS) as client:
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
        message = f"{url} does not answer: {error}"
        fail(Exit.UNREACHABLE, "server_unreachable", message, as_json=as_json, hint=UNREACHABLE_HINT)


def _problem_text(problem: FieldProblem) -> str:
    where = problem["pointer"] or problem["parameter"]
    return f"{where}: {problem['message']} {problem['hint']}".removeprefix(": ").rstrip()


def _credentials(settings: Settings, *, as_json: bool) -> tuple[str, str]:
    """URL and key: each from its setting, else from the data folder's credentials.json.

    What is in that file is used only for the server that wrote it, while it listens. Somebody else's program
    may have its port by now, and would be sent the key.
    """
    if settings.url is not None and settings.api_key is not None:
        return settings.url, settings.api_key.get_secret_value()
    file = settings.credentials_file
    if not file.exists():
        absent = "API key" if settings.api_key is None else "server"
        variable = "BITMILL_API_KEY" if settings.api_key is None else "BITMILL_URL"
        message = f"There is no {absent}: neither {variable} nor {file}."
        hint = "`bitmill serve` makes the file at its first start."
        fail(Exit.USAGE, "no_credentials", message, as_json=as_json, hint=hint)
    stored: dict[str, str] = json.loads(file.read_text())
    url = stored["url"]
    if settings.url is not None and settings.url.rstrip("/") != url:
        message = f"The key in {file} is for {url}, and BITMILL_URL is {settings.url}."
        hint = "Set BITMILL_API_KEY to a key of that server, or leave out BITMILL_URL."
        fail(Exit.USAGE, "key_of_another_server", message, as_json=as_json, hint=hint)
    from api.listening import is_announced

    if not is_announced(settings.data_dir, url):
        message = f"No `bitmill serve` of {settings.data_dir} listens at {url}. No key was sent there."
        fail(Exit.UNREACHABLE, "server_unreachable", message, as_json=as_json, hint=UNREACHABLE_HINT)
    return url, settings.api_key.get_secret_value() if settings.api_key else stored["api_key"]
