"""A minute of kills on one stack, half of one on the other, and every promise kept."""

from __future__ import annotations

import sys

import pytest

from tests.chaos.run import MakeStack, Plan, run
from tests.chaos.stack import distributed, embedded


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (distributed, Plan(seed=1, jobs=4, seconds=60, every=4, drain_seconds=150)),
        (embedded, Plan(seed=1, jobs=2, seconds=30, every=10, drain_seconds=150)),
    ],
)
def test_every_job_succeeds_whatever_is_killed(make: MakeStack, plan: Plan) -> None:
    result = run(make, plan, lambda line: sys.stderr.write(f"{line}\n"))
    assert result.complaints == []
    assert result.killed.total() >= 3
