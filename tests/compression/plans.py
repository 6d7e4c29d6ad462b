"""Plans that are refused, and why: what the tests of planning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compression.errors import PlanError, Problem
from compression.planning.planner import plan
from compression.recipe import Calibration, DatasetSpec, Recipe

DATA = DatasetSpec(texts=("some text",))
FEW = Calibration(num_calibration_samples=4, max_seq_length=128)


def recipe(scheme: str = "W4A16", type: str = "rtn", **fields: Any) -> Recipe:
    return Recipe.model_validate({"steps": [{"type": type, "scheme": scheme, **fields}]})


def problems_of(folder: Path, recipe_: Recipe | None = None, **options: Any) -> list[Problem]:
    with pytest.raises(PlanError) as caught:
        plan(folder, recipe_ or recipe(), **options)
    for problem in caught.value.problems:
        assert str(folder.parent) not in problem.message + problem.hint
    assert caught.value.code == caught.value.problems[0].code
    return list(caught.value.problems)


def problem_of(folder: Path, recipe_: Recipe | None = None, **options: Any) -> Problem:
    problems = problems_of(folder, recipe_, **options)
    assert len(problems) == 1, problems
    return problems[0]


def codes(problems: list[Problem]) -> list[str]:
    return [problem.code for problem in problems]
