"""`bitmill batch`: many jobs at once."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli.exits import Exit
from cli.output import JsonOption, err, fail, out, print_json

if TYPE_CHECKING:
    from api.client import Client
    from api.client.types import AcceptedItem, BatchCounts, BatchRead, RefusedItem

POLL_SECONDS = 1.0
_PAGE = 100
_ALL = 1000
_SHOWN_REFUSALS = 10

app = typer.Typer(help="Many jobs at once.", no_args_is_help=True)

BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="The batch's id.")]


@app.command()
def submit(
    file: Annotated[
        Path,
        typer.Argument(help=".jsonl: the body of a job on each line. .json: jobs or a sweep, as in /docs."),
    ],
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key with the same file gives the same batch.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit up to 1,000 jobs.

    Each is accepted or refused on its own; if any is refused, the exit code is 4 and the others go on.
    """
    body = _read(file, as_json=as_json)
    from cli.connection import server

    with server(as_json=as_json) as client:
        batch = client.submit_batch(body, name=name, idempotency_key=idempotency_key)
    if as_json:
        print_json(batch)
    else:
        counts = batch["counts"]
        out().print(f"{batch['id']}: {counts['accepted']} of {counts['total']} jobs are accepted.")
        _print_refusals(batch["items"])
    if batch["counts"]["refused"]:
        raise typer.Exit(Exit.REFUSED)


@app.command("list")
def list_batches(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List batches, the newest first."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        found = list(islice(client.batches(page_size=min(limit, _PAGE)), limit))
    if as_json:
        print_json({"batches": found})
    elif found:
        _print_table(found)
    else:
        out().print("There are no batches yet.")


@app.command()
def show(
    batch_id: BatchId,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress, and end when all jobs ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a batch has come, and what was refused.

    With --wait the exit code is 0 only if all its jobs succeeded. Ctrl-C ends the waiting, not the jobs.
    """
    from cli.connection import server

    with server(as_json=as_json) as client:
        if wait:
            try:
                wait_for(client, batch_id, quiet=as_json)
            except KeyboardInterrupt:
                hint = f"Cancel it with: bitmill batch cancel {batch_id}"
                fail(Exit.INTERRUPTED, "interrupted", f"{batch_id} goes on.", as_json=as_json, hint=hint)
        batch = client.batch(batch_id)
        items = list(client.batch_items(batch_id, page_size=_ALL))
    if as_json:
        print_json({**batch, "items": items})
    else:
        _print_table([batch])
        _print_refusals(items)
    if wait and batch["counts"]["succeeded"] < batch["counts"]["total"]:
        raise typer.Exit(Exit.FAILED)


@app.command()
def cancel(batch_id: BatchId, as_json: JsonOption = False) -> None:
    """Cancel all jobs of a batch. What they have finished stays for a retry."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        batch = client.cancel_batch(batch_id)
    if as_json:
        print_json(batch)
    else:
        out().print(f"{batch_id}: {states(batch['counts'])}.")


def states(counts: BatchCounts) -> str:
    """How many items are what: "1 refused, 2 running, 5 succeeded"."""
    sums = ("total", "accepted")
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count and state not in sums)


def _read(file: Path, *, as_json: bool) -> Any:
    """The lines as they are, which the server checks one by one; or the one JSON document."""
    try:
        content = file.read_bytes()
        return content if file.suffix.lower() == ".jsonl" else json.loads(content)
    except (OSError, ValueError) as error:
        fail(Exit.USAGE, "bad_file", f"{file}: {error}", as_json=as_json)


def done(counts: BatchCounts) -> int:
    """How many of the jobs that were accepted have ended."""
    return counts["accepted"] - counts["queued"] - counts["running"] - counts["cancelling"]


def wait_for(client: Client, batch_id: str, *, quiet: bool) -> None:
    """Follow a batch until none of its jobs goes on, with progress on stderr."""
    from rich.console import Console

    from cli.progress import batch_progress

    with batch_progress(Console(quiet=True) if quiet else err()) as show:
        while True:
            counts = client.batch(batch_id)["counts"]
            show(done(counts), counts["accepted"], states(counts))
            if done(counts) == counts["accepted"]:
                return
            time.sleep(POLL_SECONDS)


def _print_refusals(items: list[AcceptedItem | RefusedItem]) -> None:
    refused = [cast("RefusedItem", item) for item in items if "error" in item]
    for item in refused[:_SHOWN_REFUSALS]:
        error = item["error"]
        err().print(f"item {item['index']}: {error['code']}: {error['detail']} {error['hint']}", markup=False)
    if len(refused) > _SHOWN_REFUSALS:
        err().print(f"and {len(refused) - _SHOWN_REFUSALS} more; --json has them all.")


def _print_table(found: list[BatchRead]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("batch", "done", "jobs", "created", "name"):
        kept = max(len(str(batch["id"])) for batch in found) if heading == "batch" else None
        table.add_column(heading, no_wrap=True, min_width=kept)
    for batch in found:
        counts = batch["counts"]
        table.add_row(
            batch["id"],
            f"{done(counts)}/{counts['accepted']}",
            states(counts),
            batch["created_at"][:19].replace("T", " "),
            batch["name"] or "",
        )
    out().print(table)
