"""A seed says what is killed when."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tests.chaos.monkey import schedule

VICTIMS = ("engine", "api", "worker")


def test_the_same_seed_kills_the_same() -> None:
    assert schedule(7, 600, VICTIMS, 4) == schedule(7, 600, VICTIMS, 4)
    assert schedule(7, 600, VICTIMS, 4) != schedule(8, 600, VICTIMS, 4)


def test_every_victim_gets_its_turn() -> None:
    kills = schedule(7, 600, VICTIMS, 4)
    assert 100 < len(kills) < 200
    assert all(before.at < after.at < 600 for before, after in pairwise(kills))
    for start in range(0, len(kills) - 2, 3):
        assert Counter(kill.victim for kill in kills[start : start + 3]) == Counter(VICTIMS)
