"""What was freed is the system's again: in a process of its own, since the whole of one is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, re
from pathlib import Path

import torch

from compression.machine import host_memory


def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def filled(mib, count):
    return [torch.ones(mib << 18) for _ in range(count)]  # float32


{setup}
filled(31, 1)  # freeing it is what makes malloc keep blocks up to its size
host_memory.give_back()
before = resident()
blocks = filled({mib}, {count})
last = torch.ones(1 << 18)  # behind them, too large for a hole before: the heap's end stays where it is
held = resident()
del blocks
{teardown}
print(round(held - before), round(resident() - before))
"""


def held_and_kept(mib: int, count: int, *, setup: str = "", teardown: str = "") -> tuple[int, int]:
    """MiB that so many blocks take, and what the process has of them after they were freed."""
    script = SCRIPT.format(mib=mib, count=count, setup=setup, teardown=teardown)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    held, kept = map(int, done.stdout.split())
    return held, kept


def test_large_blocks_go_back_when_they_are_freed() -> None:
    held, kept = held_and_kept(40, 8, setup="host_memory.map_large_blocks()")
    assert held == pytest.approx(320, abs=16)
    assert kept < 32


@pytest.mark.parametrize(("mib", "count"), [(1, 200), (16, 20)])
def test_smaller_blocks_go_back_on_request(mib: int, count: int) -> None:
    held, kept = held_and_kept(
        mib, count, setup="host_memory.map_large_blocks()", teardown="host_memory.give_back()"
    )
    assert held == pytest.approx(mib * count, abs=16)
    assert kept < 32


def test_little_is_kept_until_it_is_worth_a_request() -> None:
    """And added up: three times 12 MiB are one time 36."""
    setup = "host_memory.map_large_blocks(); host_memory.give_back()"
    assert held_and_kept(4, 3, setup=setup, teardown="host_memory.give_back()")[1] >= 10
    assert held_and_kept(4, 9, setup=setup, teardown="host_memory.give_back()")[1] < 10


def test_a_phase_begins_without_what_the_last_one_freed() -> None:
    setup = "from compression.machine.clock import Clock; clock = Clock(); host_memory.map_large_blocks()"
    assert held_and_kept(16, 20, setup=setup, teardown="clock.phase('next').__enter__()")[1] < 32


def test_without_either_malloc_keeps_them() -> None:
    """Should this fail, the module is no longer needed."""
    assert held_and_kept(16, 20)[1] > 160
    assert held_and_kept(16, 20, setup="host_memory.map_large_blocks()")[1] > 160
    assert held_and_kept(1, 200)[1] > 100
