"""Where output goes: results to stdout, everything else to stderr, so that a pipe gets results only.

With --json a command writes exactly one JSON document to stdout, also when it fails: {"error": {...}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli.exits import Exit

if TYPE_CHECKING:
    from rich.console import Console

    from api.settings import Settings

PIPE_WIDTH = 160  # where there is no terminal to fit into
JsonOption = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


@cache
def out() -> Console:
    """The console of results."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(highlight=False, soft_wrap=True, width=width)


@cache
def err() -> Console:
    """The console of progress and complaints."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any, *, indent: int | None = 2) -> None:
    """One JSON document, on stdout; on one line with indent None."""
    sys.stdout.write(json.dumps(document, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table of plain text, as a result."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    out().print(table)


def fail(
    exit_code: Exit, code: str, message: str, *, as_json: bool, hint: str = "", **extra: Any
) -> NoReturn:
    """Say what went wrong and leave with that exit code."""
    if as_json:
        error = {"code": code, "message": message, "hint": hint, **extra}
        print_json({"error": {name: value for name, value in error.items() if value}})
    else:
        err().print(f"[bold red]{code}[/] ", end="")
        err().print(message, markup=False)
        if hint:
            err().print(hint, markup=False)
    raise typer.Exit(exit_code)


def load_settings(*, as_json: bool) -> Settings:
    """The settings, or exit code 2 where a variable has a value that cannot be."""
    from pydantic import ValidationError

    from api.settings import get_settings

    try:
        return get_settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        message = f"BITMILL_{name}: {first['msg']}" if name else first["msg"]
        fail(Exit.USAGE, "bad_setting", message, as_json=as_json)
