"""What a finished job came to, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cli.formats import bytes_text, seconds_text

if TYPE_CHECKING:
    from api.client.types import JobRead


def table(job: JobRead, report: dict[str, Any]) -> Table:
    """Size, accuracy, seconds by phase and peak memory of a succeeded job."""
    shown = Table(
        title=f"{Path(job['model']).name} as {job['scheme']} by {job['method']}",
        title_justify="left",
        caption=_found(job, report),
        caption_justify="left",
    )
    shown.add_column("")
    for heading in ("before", "after", ""):
        shown.add_column(heading, justify="right")
    for row in _rows(report):
        shown.add_row(*row)
    return shown


def _found(job: JobRead, report: dict[str, Any]) -> str | None:
    """That nothing was computed this time, where the result is another job's."""
    if job["deduplicated_from"] is None:
        return None
    then = seconds_text(report["totals"]["seconds"])
    return f"found: the same work was done before, {then} then\nby {job['deduplicated_from']}"


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    totals, evaluation = report["totals"], report["evaluation"]
    before, after = totals["source_bytes"], totals["output_bytes"]
    yield "size", bytes_text(before), bytes_text(after), f"{after / before:.1%}"
    if evaluation is None:
        yield "perplexity", "not measured", "", ""
    else:
        yield from _evaluation_rows(evaluation)
    phases: dict[str, float] = report["phases"]
    yield "seconds", "", seconds_text(totals["seconds"]), ""
    for name, seconds in phases.items():
        yield f"  {name}", "", seconds_text(seconds), f"{seconds / totals['seconds']:.0%}"
    yield "peak memory of the engine", "", bytes_text(report["peak_host_bytes"]), "host"
    if report["peak_gpu_bytes"]:
        yield "", "", bytes_text(report["peak_gpu_bytes"]), "GPU"


def _evaluation_rows(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    original, compressed = evaluation["perplexity_original"], evaluation["perplexity_compressed"]
    yield (
        "perplexity, held-out text",
        f"{original:.3f}",
        f"{compressed:.3f}",
        f"x {compressed / original:.4f}",
    )
    kl = evaluation["kl_divergence"]
    yield "KL divergence, nats a token", "", f"{kl:.4f}", f"± {evaluation['kl_divergence_stderr']:.4f}"
    yield "same most likely next token", "", f"{evaluation['top1_agreement']:.2%}", ""
