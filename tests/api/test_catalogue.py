"""What the server says it takes is what it takes, and what docs/schemes.md says."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from api.catalogue import service
from api.projects import service as projects
from api.projects.schemas import ProjectUpdate
from api.settings import Settings
from compression import catalogue
from compression.data.hub_streaming import HubDataset
from compression.errors import PlanError
from compression.recipe import Calibration, DatasetSpec, Recipe
from compression.schemes import get_scheme
from tests.api.conftest import Server

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
BOUNDS = ("least", "most")
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
    lines = [*PAGE.read_text().splitlines(), ""]
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


@pytest.mark.parametrize(
    ("method", "recovery", "cost"),
    [
        ("gptq", "High recovery", "more expensive and slower to run"),
        ("awq", "Better recovery", "a faster runtime than GPTQ"),
        ("smoothquant", "Good recovery", "minimal calibration time"),
        ("rtn", "Moderate recovery", "computationally cheap and fast"),
    ],
)
def test_methods_say_what_the_guide_says_of_them(
    server: Server, method: str, recovery: str, cost: str
) -> None:
    (said,) = [row["recovery"] for row in items(server, "/v1/methods") if row["name"] == method]
    assert said.startswith(recovery)
    assert cost in said


def test_the_page_has_every_scheme(server: Server) -> None:
    lines = [*PAGE.read_text().splitlines(), ""]
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


def datasets(server: Server) -> dict[str, Any]:
    answer = server.http.get("/v1/datasets")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_page_has_every_dataset(server: Server) -> None:
    found = datasets(server)
    lines = [*PAGE.read_text().splitlines(), ""]
    kinds = [
        cells([row["kind"]], [row["field"]], row["description"][:-1], row["suffixes"])
        for row in found["items"]
    ]
    named = [
        cells(
            [row["name"]],
            [row["hub"]],
            row["config"] or "",
            row["split"],
            row["columns"],
            row["chat_template"],
        )
        for row in found["named"]
    ]
    calibration = [
        cells(
            [row["name"]],
            json.dumps(row["default"]),
            *("" if row[name] is None else row[name] for name in BOUNDS),
        )
        for row in found["calibration"]
    ]
    for rows in (kinds, named, calibration):
        start = lines.index(rows[0])
        assert lines[start : start + len(rows) + 1] == [*rows, ""]
    assert f"the first of {cells(found['columns'])[2:-2]}" in PAGE.read_text()


def test_kinds_are_what_a_submission_takes(server: Server) -> None:
    found = datasets(server)["items"]
    values = {"path": "/x.txt", "hub": "c4", "s3": "s3://bucket/x.txt", "texts": ["x"], "generated": True}
    assert [row["field"] for row in found] == list(values)
    for row in found:
        DatasetSpec.model_validate({row["field"]: values[row["field"]]})
    assert DatasetSpec.model_validate("self").generated


def test_calibration_is_bounded_as_it_says(server: Server) -> None:
    assert {
        row["name"]: row["default"] for row in datasets(server)["calibration"]
    } == Calibration().model_dump()
    for row in datasets(server)["calibration"]:
        for bound, beyond in (("least", -1), ("most", 1)):
            if row[bound] is not None:
                Calibration.model_validate({row["name"]: row[bound]})
                with pytest.raises(ValidationError):
                    Calibration.model_validate({row["name"]: row[bound] + beyond})


def test_named_datasets_are_read_as_they_say(server: Server) -> None:
    for row in datasets(server)["named"]:
        read = HubDataset.of(DatasetSpec(hub=row["name"]))
        assert (read.ref.id, read.config, read.split) == (row["hub"], row["config"], row["split"])
        assert (read.messages_column is not None) == row["chat_template"]
        if row["template"] is None:
            assert row["columns"] == [read.text_column or read.messages_column]
        else:
            assert row["template"] == read.templates[0]
            row["template"].format(**dict.fromkeys(row["columns"], "x"))


def test_what_is_available_is_what_the_settings_allow(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(settings: Settings) -> dict[str, tuple[bool, str]]:
        rows = service.datasets(settings, 1000).items
        return {row.kind: (row.available, row.note) for row in rows}

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    all_of_it = server.settings.model_copy(update={"s3_prefixes": ("s3://texts",)})
    assert set(available(all_of_it).values()) == {(True, "")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nothing = server.settings.model_copy(update={"local_roots": ()})
    assert {kind: note for kind, (there, note) in available(nothing).items() if not there} == {
        "path": "The server has no BITMILL_LOCAL_ROOTS.",
        "s3": "The server has no BITMILL_S3_PREFIXES.",
    }
    assert available(nothing)["hub"] == (True, "Only what is cached: the server has HF_HUB_OFFLINE.")


def test_the_limit_of_a_request_is_the_caller_s(server: Server) -> None:
    def limit() -> str:
        (texts,) = [row for row in datasets(server)["items"] if row["kind"] == "texts"]
        return str(texts["limits"])

    assert limit() == "A request has at most 200000 bytes."
    with server.database.write() as session:
        projects.update(session, "default", ProjectUpdate(max_body_bytes=5000))
    assert limit() == "A request has at most 5000 bytes."


def test_they_need_a_key(server: Server) -> None:
    server.http.headers.pop("Authorization")
    for name in ("methods", "schemes", "datasets"):
        assert server.http.get(f"/v1/{name}").status_code == 401
