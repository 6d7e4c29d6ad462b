"""`bitmill jobs` and `bitmill cancel`."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.output import JsonOption, out, print_json

if TYPE_CHECKING:
    from api.client.types import JobRead, JobStatus

PAGE = 100
"""Items in one answer of the server."""


def jobs(
    status: Annotated[
        str | None,
        typer.Option(help="queued, running, cancelling, succeeded, failed, cancelled or expired."),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Only those of this batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, the newest first."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        checked = cast("JobStatus | None", status)  # the server refuses other values
        found = list(islice(client.jobs(status=checked, batch=batch, page_size=min(limit, PAGE)), limit))
    if as_json:
        print_json({"jobs": found})
    elif found:
        _print_table(found)
    else:
        out().print("There are no such jobs." if status or batch else "There are no jobs yet.")


def cancel(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")], as_json: JsonOption = False
) -> None:
    """Cancel a job. What it has finished stays for a retry."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job)
    else:
        out().print(f"{job_id} is {job['status']}.")


def _print_table(found: list[JobRead]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("job", "status", "layers", "scheme", "method", "created", "name or model"):
        # On a narrow terminal the last column gives way: an id that is cut is of no use.
        kept = max((len(str(job["id"])) for job in found), default=0) if heading == "job" else None
        table.add_column(heading, no_wrap=True, min_width=kept)
    for job in found:
        table.add_row(
            job["id"],
            job["status"],
            f"{job['layers_done']}/{job['layers_total']}",
            job["scheme"],
            job["method"],
            job["created_at"][:19].replace("T", " "),
            job["name"] or job["model"],
        )
    out().print(table)
