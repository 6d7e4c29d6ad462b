"""`make chaos`: both stacks, one after the other. The same seed kills the same at the same moments."""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from tests.chaos.run import MakeStack, Plan, Result, run
from tests.chaos.stack import distributed, embedded

DRAIN_SECONDS = 600
_EVERY_SECONDS = 4.0
_SERVE_EVERY_SECONDS = 15.0  # a job takes a third of it, and a start of `bitmill serve` some seconds


def main() -> int:
    """0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="decides every kill")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of kills; half as many on the embedded one"
    )
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--only", choices=("distributed", "embedded"), help="one stack instead of both")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that nothing is left running
    console = Console()
    console.print(f"seed {asked.seed}; once more: make chaos SEED={asked.seed} MINUTES={asked.minutes:g}")
    stacks: dict[str, tuple[MakeStack, float, float]] = {
        "distributed": (distributed, 60 * asked.minutes, _EVERY_SECONDS),
        "embedded": (embedded, 30 * asked.minutes, _SERVE_EVERY_SECONDS),
    }
    failed = False
    for name, (make, seconds, every) in stacks.items():
        if asked.only in (None, name):
            result = run(make, Plan(asked.seed, asked.jobs, seconds, every, DRAIN_SECONDS), _tell)
            console.print(_table(name, result))
            failed |= bool(result.complaints)
    return int(failed)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _table(name: str, result: Result) -> Table:
    rows = {
        "killed": _counts(result.killed),
        "ended unasked": _counts(result.ended),
        "answers of a service that was away": _counts(result.refused),
        "attempts": _counts(result.outcomes),
        "drained after": f"{result.drained_seconds:.0f} s",
        "not as promised": "\n".join(result.complaints) or "nothing",
    }
    table = Table(title=name, show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
