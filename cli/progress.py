"""Progress while one waits for a job or a batch: a live bar on a terminal, else a line for each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from cli.formats import bytes_text, seconds_text

if TYPE_CHECKING:
    from api.client.types import EventRead


class View(Protocol):
    """Shows one job's events as they come. Entered before the first, left after the last."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: EventRead) -> None: ...


def view_for(console: Console, layers_total: int) -> View:
    """The bar where the console is a terminal, lines where it is a file or a pipe."""
    return Bar(console, layers_total) if console.is_terminal else Lines(console)


def sentence(event: EventRead) -> str | None:
    """An event as a line of text; None for events that are of no interest to the person who waits."""
    data = event["data"]
    match event["type"]:
        case "phase_changed":
            return str(data["phase"])
        case "layer_solved":
            return f"layer {data['layer'] + 1}/{data['layers_total']}{_details(data)}"
        case "layer_replayed":
            return f"layer {data['layer'] + 1}/{data['layers_total']}  was finished before"
        case "fetch_progress":
            return f"fetching {data['what']} {data['name']}: {_amount(data)}"
        case "generation_progress":
            return f"writing calibration text: {_tokens(data)}"
        case "warning":
            return f"warning {data['code']}: {data['message']}"
        case "attempt_ended" if data["outcome"] != "succeeded":
            reason = f": {data['message']}" if data.get("message") else ""
            return f"attempt {event['attempt']} {data['outcome']}{reason}"
        case "attempt_started" if (event["attempt"] or 0) > 1:
            return f"attempt {event['attempt']} goes on"
    return None


def _amount(data: dict[str, Any]) -> str:
    if data["total"] is None:
        return f"{data['done']} rows"
    return f"{bytes_text(data['done'])} of {bytes_text(data['total'])}"


def _tokens(data: dict[str, Any]) -> str:
    return f"{data['done']:,} of {data['total']:,} tokens"


def _details(data: dict[str, Any]) -> str:
    error = data["relative_error"]
    shown = "" if error is None else f"  relative error {error:.2e}"
    return f"{shown}  {seconds_text(data['eta_seconds'])} left"


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: EventRead) -> None:
        pass


class Lines(Silent):
    """Shows one line for each event."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, event: EventRead) -> None:
        line = sentence(event)
        if line is not None:
            self._console.print(line, markup=False)


class Bar:
    """A bar of layers with the phase, the current relative error and the time that is left."""

    def __init__(self, console: Console, layers_total: int) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn("{task.completed}/{task.total} layers"),
            TextColumn("{task.fields[details]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("queued", total=layers_total, details="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, event: EventRead) -> None:
        data = event["data"]
        match event["type"]:
            case "phase_changed":
                self._progress.update(self._task, description=data["phase"], details="")
            case "layer_solved":
                self._layer(data, _details(data))
            case "layer_replayed":
                self._layer(data, "  was finished before")
            case "fetch_progress":
                self._progress.update(self._task, details=f"  {data['name']}: {_amount(data)}")
            case "generation_progress":
                self._progress.update(self._task, details=f"  {_tokens(data)}")
            case _:
                line = sentence(event)
                if line is not None:
                    self._console.print(line, markup=False)

    def _layer(self, data: dict[str, Any], details: str) -> None:
        done, total = data["layer"] + 1, data["layers_total"]
        # drawn at once: the next event may come with the same answer, and would hide it
        self._progress.update(self._task, completed=done, total=total, details=details, refresh=True)


@contextmanager
def batch_progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A function (done, total, states) that shows the progress of a batch."""
    if not console.is_terminal:
        said = ""

        def say(done: int, total: int, states: str) -> None:
            nonlocal said
            line = f"{done}/{total} jobs  {states}"
            if line != said:
                console.print(line, markup=False)
            said = line

        yield say
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TaskProgressColumn("{task.completed}/{task.total} jobs"),
        TextColumn("{task.fields[states]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, states="")

        def draw(done: int, total: int, states: str) -> None:
            progress.update(task, completed=done, total=total, states=f"  {states}", refresh=True)

        yield draw
