"""What the server says it takes is what it takes, and what docs/schemes.md says."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compression import catalogue
from compression.errors import PlanError
from compression.recipe import Recipe
from compression.schemes import get_scheme
from tests.api.conftest import Server

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
ORDER = ("smoothquant", "awq", "sparsegpt", "wanda", "magnitude", "rtn", "gptq")


def items(server: Server, path: str) -> list[dict[str, Any]]:
    answer = server.http.get(path)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


def cells(*values: Any) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(f"`{each}`" for each in value)
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    return f"| {' | '.join(map(text, values))} |"


def test_the_page_has_every_method(server: Server) -> None:
    lines = PAGE.read_text().splitlines()
    rows = [
        cells(
            [row["name"]],
            f"{row['description'][:-1]} ([paper]({row['source']}))"
            if row["source"]
            else row["description"][:-1],
            row["needs_calibration"],
            row["composes_with"],
            row["recovery"],
            row["aliases"],
        )
        for row in items(server, "/v1/methods")
    ]
    start = lines.index(rows[0])
    assert lines[start : start + len(rows) + 1] == [*rows, ""]


def test_the_page_has_every_scheme(server: Server) -> None:
    lines = PAGE.read_text().splitlines()
    names = ("weights", "activations", "format", "needs_calibration", "composes_with", "recovery")
    rows = [
        cells([row["name"], *row["aliases"]], *(row[name] for name in names))
        for row in items(server, "/v1/schemes")
    ]
    start = lines.index(rows[0])
    assert lines[start : start + len(rows) + 1] == [*rows, ""]


@pytest.mark.parametrize(("one", "other"), list(permutations(ORDER, 2)))
def test_methods_compose_with_those_that_they_name(one: str, other: str) -> None:
    (named,) = [method.composes_with for method in catalogue.methods() if method.name == one]
    types = sorted({one, other, "rtn"} if "gptq" not in (one, other) else {one, other}, key=ORDER.index)
    steps = [{"type": name} | ({"scheme": "W4A16"} if name in ("rtn", "gptq") else {}) for name in types]
    try:
        Recipe.model_validate(steps)
    except ValidationError:
        assert other not in named
    else:
        assert other in named


def test_methods_need_data_as_they_say() -> None:
    for method in catalogue.methods():
        step = {"type": method.name} | ({"scheme": "W4A16"} if method.name in ("rtn", "gptq", "awq") else {})
        steps = [step, {"type": "rtn", "scheme": "W8A8"}] if method.name == "smoothquant" else [step]
        assert Recipe.model_validate(steps).needs_data == method.needs_calibration, method.name


@pytest.mark.parametrize("scheme", catalogue.schemes(), ids=lambda scheme: scheme.name)
def test_schemes_are_made_by_what_they_name(scheme: catalogue.SchemeRow) -> None:
    for alias in scheme.aliases:
        assert get_scheme(alias).name == scheme.name
    for method in (each.name for each in catalogue.methods()):
        if method == "smoothquant":
            continue  # has no short form
        if method in scheme.composes_with:
            recipe = Recipe.from_short(scheme.name, method=method, has_dataset=True)
            assert recipe.representation == scheme.name
        else:
            with pytest.raises((PlanError, ValidationError)):
                Recipe.from_short(scheme.name, method=method, has_dataset=True)


def test_they_need_a_key(server: Server) -> None:
    server.http.headers.pop("Authorization")
    assert server.http.get("/v1/methods").status_code == 401
    assert server.http.get("/v1/schemes").status_code == 401
