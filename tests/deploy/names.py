"""What the code calls things: settings and commands."""

from __future__ import annotations

import typer

from api.settings import Settings
from cli.main import app


def setting_variables() -> set[str]:
    """Every environment variable that is a setting."""
    return {f"BITMILL_{name.upper()}" for name in Settings.model_fields}


def commands() -> set[str]:
    """Every command of `bitmill`, subcommands with their group's name: {"serve", "db upgrade", ...}."""
    return _commands(app, "")


def _commands(group: typer.Typer, prefix: str) -> set[str]:
    own = {
        prefix + (info.name or info.callback.__name__.replace("_", "-"))
        for info in group.registered_commands
        if info.callback is not None
    }
    below = (
        _commands(info.typer_instance, f"{prefix}{info.name} ")
        for info in group.registered_groups
        if info.typer_instance is not None
    )
    return own.union(*below)
