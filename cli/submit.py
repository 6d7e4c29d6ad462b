"""`bitmill submit`: send a job, and with --wait see it through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.exits import Exit
from cli.output import JsonOption, err, fail, out, print_json
from cli.request import BadOptions, JobOptions, body
from compression.schemes import SCHEMES, SPARSE_SCHEMES

if TYPE_CHECKING:
    from api.client import Client
    from api.client.types import JobDetail, JobRead

_What = {"rich_help_panel": "What"}
_How = {"rich_help_panel": "How"}
_Data = {"rich_help_panel": "Data and evaluation"}
_Run = {"rich_help_panel": "The job"}


def submit(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder below one of the server's local roots, owner/name[@revision] on the Hub, or s3://bucket/folder."
        ),
    ],
    scheme: Annotated[
        str | None, typer.Option(help=f"{', '.join([*SCHEMES, *SPARSE_SCHEMES])}.", **_What)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML or JSON file, instead of a scheme.", **_What)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a .jsonl, .parquet, .csv or .txt file, a name on the Hub, or self.",
            **_What,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="gptq, awq or rtn; sparsegpt, wanda or magnitude for a sparse scheme. "
            "By default gptq for int and fp4 weights with a dataset, else rtn.",
            **_How,
        ),
    ] = None,
    observer: Annotated[
        str | None, typer.Option(help="How scales are found: minmax, mse, imatrix or gram.", **_How)
    ] = None,
    group_size: Annotated[
        str | None, typer.Option(help="Columns that share a scale, or auto.", metavar="N|auto", **_How)
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Modules to compress; can be repeated.", **_How)
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Modules to leave as they are; can be repeated.", **_How)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse an --ignore that matches no module.", **_How)
    ] = False,
    text_column: Annotated[str | None, typer.Option(help="Column with the text.", **_Data)] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column with chat messages.", **_Data)] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Part of a dataset on the Hub.", **_Data)] = None,
    dataset_split: Annotated[
        str | None, typer.Option(help="Split of it; train unless given.", **_Data)
    ] = None,
    num_calibration_samples: Annotated[int | None, typer.Option(help="512 unless given.", **_Data)] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Tokens; 2048 unless given.", **_Data)] = None,
    packing: Annotated[
        bool | None, typer.Option(help="Fill samples with several documents, or not.", **_Data)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which documents, in which order.", **_Data)] = None,
    max_dropped_share: Annotated[
        float | None,
        typer.Option(help="Share of the rows read that may be unusable; 0.05 unless given.", **_Data),
    ] = None,
    evaluation: Annotated[bool, typer.Option(help="Measure perplexity on held-out text.", **_Data)] = True,
    num_evaluation_samples: Annotated[int | None, typer.Option(help="Held-out samples.", **_Data)] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="Fail the job if perplexity rises by more than this factor.", **_Data)
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(help="vllm, transformers or both: refuse what they could not load or run.", **_Run),
    ] = None,
    device_class: Annotated[str | None, typer.Option(help="any, cpu or cuda.", **_Run)] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher goes first.", **_Run)] = None,
    name: Annotated[str | None, typer.Option(help="A name for people.", **_Run)] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", **_Run)] = None,
    max_runtime_seconds: Annotated[int | None, typer.Option(help="Fail the job after this.", **_Run)] = None,
    max_queue_seconds: Annotated[int | None, typer.Option(help="Give up waiting after this.", **_Run)] = None,
    callback: Annotated[
        str | None, typer.Option(help="Webhook that gets a message at its end.", **_Run)
    ] = None,
    cache: Annotated[
        bool, typer.Option(help="Take what another job of the project has made of the same.", **_Run)
    ] = True,
    output: Annotated[
        str | None, typer.Option(help="Copy the files there too.", metavar="s3://BUCKET/FOLDER", **_Run)
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key with the same options gives the same job.", **_Run)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress, and end when the job ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a compression job.

    With --wait the exit code is 0 only if the job succeeded. Ctrl-C ends the waiting, not the job.
    """
    options = JobOptions(
        model=model,
        dataset=dataset,
        text_column=text_column,
        messages_column=messages_column,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        scheme=scheme,
        method=method,
        observer=observer,
        group_size=group_size,
        targets=target or [],
        ignore=ignore or [],
        strict=strict,
        recipe=recipe,
        num_calibration_samples=num_calibration_samples,
        max_seq_length=max_seq_length,
        packing=packing,
        seed=seed,
        max_dropped_share=max_dropped_share,
        evaluation=evaluation,
        num_evaluation_samples=num_evaluation_samples,
        max_perplexity_ratio=max_perplexity_ratio,
        require=require,
        device_class=device_class,
        priority=priority,
        name=name,
        labels=label or [],
        max_runtime_seconds=max_runtime_seconds,
        max_queue_seconds=max_queue_seconds,
        callback=callback,
        cache=cache,
        output=output,
    )
    try:
        request = body(options)
    except BadOptions as error:
        fail(Exit.USAGE, "bad_options", str(error), as_json=as_json)

    from cli.connection import server

    with server(as_json=as_json) as client:
        job = client.submit(request, idempotency_key=idempotency_key)
        if not wait:
            _print_submitted(job, as_json=as_json)
            return
        try:
            ended, report = wait_for(client, job, quiet=as_json)
        except KeyboardInterrupt:
            hint = f"Cancel it with: bitmill cancel {job['id']}"
            fail(Exit.INTERRUPTED, "interrupted", f"{job['id']} goes on.", as_json=as_json, hint=hint)
        _print_outcome(ended, report, as_json=as_json)


def wait_for(client: Client, job: JobRead, *, quiet: bool) -> tuple[JobDetail, dict[str, Any] | None]:
    """Follow a submitted job to its end, with progress on stderr. Returns it as it ended, and its report."""
    from cli.progress import Silent, view_for

    view = Silent() if quiet else view_for(err(), job["layers_total"])
    with view:
        for event in client.follow(job["id"]):
            view.show(event)
    ended = client.job(job["id"])
    return ended, client.report(job["id"]) if ended["status"] == "succeeded" else None


def _print_submitted(job: JobRead, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        same = job["deduplicated_from"]
        out().print(f"{job['id']} is {job['status']}" + (f", as {same} does the same." if same else "."))


def _print_outcome(job: JobDetail, report: dict[str, Any] | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"job": job, "report": report})
    elif report is not None:
        print_result(job, report)
    if report is None:
        if not as_json:
            err().print(failure(job), markup=False)
        raise typer.Exit(Exit.FAILED)


def failure(job: JobRead) -> str:
    """Why a job did not succeed, as a sentence."""
    error = job["error"]
    return f"{job['id']} {job['status']}" + (f": {error['code']}: {error['message']}" if error else "")


def print_result(job: JobDetail, report: dict[str, Any]) -> None:
    """The table of a succeeded job, where its checkpoint is, and how to serve it."""
    from cli.summary import table

    folder = f"{job['plan']['source']}-{job['scheme']}"
    out().print(table(job, report))
    out().print("The checkpoint is in the server's store. Fetch and serve it with:")
    out().print(f"  bitmill download {job['id']} --output-dir {folder}", markup=False)
    out().print(f"  vllm serve {folder}", markup=False)
