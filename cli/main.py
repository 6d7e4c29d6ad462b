"""`bitmill`: the command line. Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from cli import batches, catalogue, check, database, download, jobs, projects, serve, submit, webhooks

app = typer.Typer(
    help="Bitmill compresses language models: a server, a worker, and a client of both.",
    epilog="Exit codes: 0 done, 1 tried and failed, 2 wrong usage, 3 no server answers, 4 refused by it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS: tuple[Callable[..., Any], ...] = (
    serve.serve,
    serve.worker,
    submit.submit,
    jobs.jobs,
    jobs.cancel,
    download.download,
    catalogue.methods,
    catalogue.schemes,
    catalogue.datasets,
    check.doctor,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(batches.app, name="batch")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(database.app, name="db")
app.add_typer(projects.projects, name="project")
app.add_typer(projects.keys, name="key")
