"""`bitmill serve` and `bitmill worker`: the long-running commands."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.exits import Exit
from cli.folders import make_data_dir, make_scratch_dir
from cli.output import JsonOption, fail, load_settings, out, print_json

if TYPE_CHECKING:
    from api.server import OnListening
    from api.settings import Settings


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
    _override(HOST=host, PORT=port, DATA_DIR=data_dir, LOCAL_ROOTS=roots)
    settings = load_settings(as_json=as_json)
    make_data_dir(settings, as_json=as_json)
    if settings.embedded:
        make_scratch_dir(settings, as_json=as_json)
    _check_urls(settings, as_json=as_json)
    _start_tracing(settings, "bitmill" if settings.embedded else "bitmill-api", as_json=as_json)
    first_start = not settings.credentials_file.exists()

    def announce(url: str) -> None:
        _keep_url(settings.credentials_file, url)
        _print_welcome(url, settings.credentials_file, first_start=first_start, as_json=as_json)

    import migrations
    from api.listening import CannotListen
    from worker.embedded import ServeRefused, run_embedded

    try:
        (run_embedded if settings.embedded else _run_api)(settings, announce)
    except ServeRefused as error:
        fail(Exit.FAILED, error.code, str(error), as_json=as_json)
    except CannotListen as error:
        fail(Exit.FAILED, error.code, error.message, as_json=as_json, hint=error.hint)
    except migrations.SchemaNewer as error:
        fail(Exit.FAILED, "schema_newer", str(error), as_json=as_json)
    except RuntimeError as error:
        fail(Exit.FAILED, "server_died", str(error), as_json=as_json, hint="Its log above says why.")


def worker(as_json: JsonOption = False) -> None:
    """Run one worker for the device of this machine, on the database, broker and store of the settings.

    Ends at Ctrl-C or SIGTERM; a running job is given back, and another worker goes on with it.
    """
    settings = load_settings(as_json=as_json)
    make_data_dir(settings, as_json=as_json, to_write=False)
    make_scratch_dir(settings, as_json=as_json)
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


def _run_api(settings: Settings, on_listening: OnListening) -> None:
    """The API alone; workers are processes of their own."""
    from api.data_dir import secure_and_log
    from api.listening import listen
    from api.main import create_app, settle
    from api.observability import configure_logging
    from api.server import Server

    configure_logging(settings)
    secure_and_log(settings)
    with listen(settings.host, settings.port) as listener, suppress(KeyboardInterrupt):
        app = create_app(settings.model_copy(update={"port": listener.getsockname()[1]}))
        settle(app)
        Server(app, listener, settings.data_dir, on_listening).serve_until_stopped()


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
    except OSError as error:  # the folder of SQLite's file
        fail(Exit.FAILED, "database_failed", f"BITMILL_DATABASE_URL: {error}", as_json=as_json)


def _override(**settings: object) -> None:
    """Options become environment variables, so that there is one way in which settings reach the code."""
    for name, value in settings.items():
        if value is not None:
            os.environ[f"BITMILL_{name}"] = str(value)


def _keep_url(credentials: Path, url: str) -> None:
    """The file names the address of the first start; a later start may listen elsewhere."""
    if not credentials.exists():  # the first key was made by a server with another data folder
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
