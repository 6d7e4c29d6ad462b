"""`bitmill webhooks`: receivers of messages about jobs, and what was sent to them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli.output import JsonOption, out, print_json, print_table

if TYPE_CHECKING:
    from api.client.types import DeliveryRead, DeliveryStatus, WebhookCreate, WebhookRead

app = typer.Typer(help="Receivers of messages about jobs.", no_args_is_help=True)

WebhookArgument = Annotated[str, typer.Argument(metavar="WEBHOOK", help="The webhook's id.")]
LimitOption = Annotated[int, typer.Option(min=1, max=100, help="How many, the newest first.")]


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="https, to a public host, or to one that the server allows.")],
    event: Annotated[
        list[str] | None,
        typer.Option(
            help="job_queued, attempt_started, job_succeeded, job_failed, job_cancelled or job_expired; "
            "can be repeated. By default the four that end a job."
        ),
    ] = None,
    callback_only: Annotated[
        bool, typer.Option("--callback-only", help="Only for jobs that name it as their callback.")
    ] = False,
    description: Annotated[str | None, typer.Option(help="A note for people.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a webhook. Its secret is shown this once."""
    from cli.connection import server

    body: dict[str, Any] = {"url": url, "all_jobs": not callback_only, "description": description}
    if event:
        body["events"] = event
    with server(as_json=as_json) as client:
        webhook = client.create_webhook(cast("WebhookCreate", body))  # the server checks it
    if as_json:
        print_json(webhook)
    else:
        out().print(f"{webhook['id']}\nsecret: {webhook['secret']}", markup=False)


@app.command(name="list")
def list_webhooks(limit: LimitOption = 20, as_json: JsonOption = False) -> None:
    """List webhooks, the newest first."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        found = list(islice(client.webhooks(page_size=limit), limit))
    if as_json:
        print_json({"webhooks": found})
    elif found:
        print_table(("webhook", "state", "jobs", "events", "url"), map(_webhook_row, found))
    else:
        out().print("There are no webhooks yet.")


@app.command()
def remove(webhook_id: WebhookArgument, as_json: JsonOption = False) -> None:
    """Delete a webhook and its log."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        client.delete_webhook(webhook_id)
    if as_json:
        print_json({"removed": webhook_id})
    else:
        out().print(f"{webhook_id} is removed.", markup=False)


@app.command()
def ping(webhook_id: WebhookArgument, as_json: JsonOption = False) -> None:
    """Send a message that tells of no job, to see whether the receiver gets it."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        _print_sent(client.ping_webhook(webhook_id), as_json=as_json)


@app.command()
def deliveries(
    webhook_id: WebhookArgument,
    status: Annotated[str | None, typer.Option(help="pending, delivered or failed.")] = None,
    job: Annotated[str | None, typer.Option(help="Only those of this job.")] = None,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List what was sent to a webhook, and what is still to be sent, the newest first."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        checked = cast("DeliveryStatus | None", status)  # the server refuses other values
        found = list(
            islice(client.deliveries(webhook_id, status=checked, job_id=job, page_size=limit), limit)
        )
    if as_json:
        print_json({"deliveries": found})
    elif found:
        headings = ("delivery", "status", "attempts", "event", "job", "created", "last answer")
        print_table(headings, map(_delivery_row, found))
    else:
        out().print("There are no such deliveries.")


@app.command()
def redeliver(
    webhook_id: WebhookArgument,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="The delivery's id.")],
    as_json: JsonOption = False,
) -> None:
    """Send a message again, under the same id."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        _print_sent(client.redeliver(webhook_id, delivery_id), as_json=as_json)


def _print_sent(delivery: DeliveryRead, *, as_json: bool) -> None:
    if as_json:
        print_json(delivery)
    else:
        out().print(f"{delivery['id']} is {delivery['status']}.", markup=False)


def _webhook_row(webhook: WebhookRead) -> tuple[str, ...]:
    return (
        webhook["id"],
        "disabled" if webhook["disabled_at"] else "enabled",
        "all" if webhook["all_jobs"] else "callbacks",
        ", ".join(webhook["events"]),
        webhook["url"],
    )


def _delivery_row(delivery: DeliveryRead) -> tuple[str, ...]:
    return (
        delivery["id"],
        delivery["status"],
        str(delivery["attempts"]),
        delivery["event"],
        delivery["job_id"] or "",
        delivery["created_at"][:19].replace("T", " "),
        delivery["last_error"] or str(delivery["last_status_code"] or ""),
    )
