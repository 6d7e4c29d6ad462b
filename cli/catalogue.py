"""`bitmill methods`, `bitmill schemes` and `bitmill datasets`: what the server takes."""

from __future__ import annotations

from cli.output import JsonOption, out, print_json, print_table


def methods(as_json: JsonOption = False) -> None:
    """List the methods that a recipe may name."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        found = client.methods()["items"]
    if as_json:
        print_json({"methods": found})
    else:
        rows = ((row["name"], _yes(row["needs_calibration"]), row["recovery"]) for row in found)
        print_table(("method", "needs data", "recovery and cost"), rows)


def schemes(as_json: JsonOption = False) -> None:
    """List the schemes that weights may get."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        found = client.schemes()["items"]
    if as_json:
        print_json({"schemes": found})
    else:
        rows = (
            (", ".join([row["name"], *row["aliases"]]), row["weights"], row["activations"], row["recovery"])
            for row in found
        )
        print_table(("scheme", "weights", "activations", "recovery and cost"), rows)


def datasets(as_json: JsonOption = False) -> None:
    """List the kinds of datasets that the server takes, and those with a short name."""
    from cli.connection import server

    with server(as_json=as_json) as client:
        found = client.datasets()
    if as_json:
        print_json(found)
    else:
        kinds = (
            (row["kind"], _yes(row["available"]), row["description"], row["note"]) for row in found["items"]
        )
        print_table(("dataset", "available", "what", ""), kinds)
        out().print()
        named = (
            (row["name"], row["hub"], row["config"] or "", row["split"], ", ".join(row["columns"]))
            for row in found["named"]
        )
        print_table(("name", "on the Hub", "config", "split", "columns"), named)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
