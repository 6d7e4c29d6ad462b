"""`bitmill doctor`: whether this machine has what a server and a worker need."""

from __future__ import annotations

import typer

from cli.exits import Exit
from cli.output import JsonOption, load_settings, out, print_json

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(as_json: JsonOption = False) -> None:
    """Check Python, torch, data folder, disk, database, broker, store and local roots.

    Exit code 1 when a check fails; warnings do not count.
    """
    settings = load_settings(as_json=as_json)
    from cli.doctor import Check, examine

    checks: list[Check] = []
    for check in examine(settings):
        checks.append(check)
        if not as_json:
            out().print(f"[{_STYLES[check.status]}]{check.status:>7}[/]  {check.name:<12}", end="")
            out().print(f" {check.message}", markup=False)
            if check.hint:
                out().print(f"{'':>23}{check.hint}", markup=False)
    healthy = all(check.status != "failed" for check in checks)
    if as_json:
        print_json({"healthy": healthy, "checks": [check.to_dict() for check in checks]})
    if not healthy:
        raise typer.Exit(Exit.FAILED)
