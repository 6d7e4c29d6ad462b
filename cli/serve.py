"""`bitmill serve` and `bitmill worker`: the long-running commands."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.exits import Exit
from cli.output import JsonOption, fail, load_settings, out, print_json

if TYPE_CHECKING:
    from api.settings import Settings

READY_POLL_SECONDS = 0.1


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where database, artifacts and keys live.")] = None,
    local_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that models and datasets may lie in. Can be given more than once."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the API, and on the embedded broker (the default) a worker beside it.

    Every option is the setting of its name for this process. Ends at Ctrl-C or SIGTERM; a running job goes
    on at the next start.
    """
    roots = os.pathsep.join(str(root.absolute()) for root in local_root) if local_root else None
    _override(HOST=host, PORT=_free_port(host) if port == 0 else port, DATA_DIR=data_dir, LOCAL_ROOTS=roots)
    settings = load_settings(as_json=as_json)
    _check_urls(settings, as_json=as_json)
    url = _url(settings.host, settings.port)
    first_start = not settings.credentials_file.exists()

    def announce() -> None:
        _keep_url(settings.credentials_file, url)
        _print_welcome(url, settings.credentials_file, first_start=first_start, as_json=as_json)

    threading.Thread(target=_when_ready, args=(url, announce), daemon=True).start()
    _start_tracing(settings, "bitmill" if settings.embedded else "bitmill-api", as_json=as_json)
    if not settings.embedded:
        _serve_api(settings)
        return
    import migrations
    from worker.embedded import ServeRefused, run_embedded

    try:
        run_embedded(settings)
    except ServeRefused as error:
        fail(Exit.FAILED, error.code, str(error), as_json=as_json)
    except migrations.SchemaNewer as error:
        fail(Exit.FAILED, "schema_newer", str(error), as_json=as_json)
    except RuntimeError as error:
        fail(Exit.FAILED, "server_died", str(error), as_json=as_json, hint="Its log above says why.")


def worker(as_json: JsonOption = False) -> None:
    """Run one worker for the device of this machine, on the database, broker and store of the settings.

    Ends at Ctrl-C or SIGTERM; a running job is given back, and another worker goes on with it.
    """
    settings = load_settings(as_json=as_json)
    _check_urls(settings, as_json=as_json)
    _start_tracing(settings, "bitmill-worker", as_json=as_json)
    from api.errors import Unavailable
    from worker.celery_app import WorkerRefused, run_worker

    try:
        run_worker(settings)
    except WorkerRefused as error:
        fail(Exit.USAGE, "broker_is_embedded", str(error), as_json=as_json)
    except Unavailable as error:
        fail(Exit.FAILED, error.code, error.message, as_json=as_json, hint=error.hint)


def _start_tracing(settings: Settings, service: str, *, as_json: bool) -> None:
    from api.tracing import TracingRefused, start_tracing

    try:
        start_tracing(settings, service)
    except TracingRefused as error:
        fail(Exit.USAGE, "otel_missing", str(error), as_json=as_json)


def _serve_api(settings: Settings) -> None:
    """The API alone; workers are processes of their own."""
    import uvicorn

    from api.main import GRACE_SECONDS, create_app, settle
    from api.observability import configure_logging

    configure_logging(settings)
    app = create_app(settings)
    settle(app)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def _check_urls(settings: Settings, *, as_json: bool) -> None:
    """End the command with its exit code where the URL of store or database is none."""
    from sqlalchemy.exc import ArgumentError

    from api.database import make_engine
    from api.store.base import StoreError
    from api.store.factory import open_store

    try:
        open_store(settings.store_url)
    except StoreError as error:
        fail(Exit.USAGE, error.code, f"BITMILL_STORE_URL: {error.message}", as_json=as_json, hint=error.hint)
    try:
        make_engine(settings.database_url).dispose()
    except (ArgumentError, ValueError) as error:
        hint = "Give sqlite:/// and a path, or postgresql://user:password@host/name."
        fail(Exit.USAGE, "unknown_database", f"BITMILL_DATABASE_URL: {error}", as_json=as_json, hint=hint)


def _free_port(host: str | None) -> int:
    with socket.socket() as probe:
        probe.bind((host or "127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _override(**settings: object) -> None:
    """Options become environment variables, so that there is one way in which settings reach the code."""
    for name, value in settings.items():
        if value is not None:
            os.environ[f"BITMILL_{name}"] = str(value)


def _url(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    return f"http://{reachable}:{port}"


def _when_ready(url: str, announce: Callable[[], None]) -> None:
    """Announce once the server answers. Runs beside the server, and ends with the process."""
    import httpx

    from api.client import Client

    with Client(url, patience_seconds=0) as client:
        while True:
            try:
                client.alive()
            except httpx.TransportError:
                time.sleep(READY_POLL_SECONDS)
            else:
                return announce()


def _keep_url(credentials: Path, url: str) -> None:
    """The file names the address of the first start; a later start may listen elsewhere."""
    if not credentials.exists():
        return
    stored = json.loads(credentials.read_text())
    if stored["url"] != url:
        from api.security import write_private

        write_private(credentials, (json.dumps({**stored, "url": url}, indent=2) + "\n").encode())


def _print_welcome(url: str, credentials: Path, *, first_start: bool, as_json: bool) -> None:
    """Where the server is and where its key is; the key itself only at the start that made it."""
    key = json.loads(credentials.read_text())["api_key"] if first_start and credentials.exists() else None
    if as_json:
        print_json({"url": url, "credentials_file": str(credentials), "api_key": key}, indent=None)
        return
    out().print(f"Bitmill listens on [bold]{url}[/]; {url}/docs describes its API. Ctrl-C ends it.")
    if key:
        out().print(f"The API key, made at this first start: [bold]{key}[/]")
    out().print(f"Commands on this machine find the key in {credentials}")
