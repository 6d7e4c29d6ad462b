"""The Dockerfile, held to the code: no Docker engine is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Stage, parse
from tests.deploy.names import commands, setting_variables

ROOT = Path(__file__).parents[2]
STAGES = parse(ROOT / "Dockerfile")
TARGETS = ("api", "worker")


def _lineage(stage: Stage) -> list[Stage]:
    """The stage and those it is built from, through FROM and COPY --from."""
    parents = [stage.base, *(re.findall(r"--from=(\S+)", " ".join(i.value for i in stage.all("COPY"))))]
    return [stage, *(s for name in parents if name in STAGES for s in _lineage(STAGES[name]))]


def _pip_lines(target: str) -> list[str]:
    return [
        part.strip()
        for stage in _lineage(STAGES[target])
        for run in stage.all("RUN")
        for part in run.value.split("&&")
        if part.strip().startswith("pip install")
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_there_is_a_target(target: str) -> None:
    assert target in STAGES


def test_stages_build_only_on_stages_above_them() -> None:
    seen: list[str] = []
    for stage in STAGES.values():
        for name in re.findall(r"--from=(\S+)", " ".join(i.value for i in stage.all("COPY"))):
            assert name in seen
        seen.append(stage.name)


def test_the_api_is_installed_from_its_own_lock_and_nothing_else() -> None:
    dependencies = [line for line in _pip_lines("api") if "--no-deps" not in line]
    assert dependencies == ["pip install -r requirements-api.lock"]


def test_the_worker_has_the_engine_at_the_locked_versions() -> None:
    dependencies = [line for line in _pip_lines("worker") if "--no-deps" not in line]
    assert dependencies == [
        "pip install -r requirements-api.lock",
        "pip install -c requirements.lock --no-build-isolation '.[engine]'",
    ]


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name
        for stage in STAGES.values()
        for copy in stage.all("COPY")
        if "--from=" not in copy.value
        for name in copy.words[:-1]
        if name != "."
    }
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert {"api", "cli", "compression", "migrations", "worker"} <= allowed


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_is_one_of_the_console_script(target: str) -> None:
    (command,) = STAGES[target].all("CMD")
    program, *words = command.words
    assert program == "bitmill"
    assert " ".join(words) in commands()


@pytest.mark.parametrize("target", TARGETS)
def test_no_image_runs_as_root(target: str) -> None:
    users = [user.value for stage in _lineage(STAGES[target]) for user in stage.all("USER")]
    assert users == ["bitmill"]


def test_every_variable_is_a_setting() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"\bBITMILL_\w+", text)) <= setting_variables()


def test_the_image_s_python_is_one_that_the_package_takes() -> None:
    bases = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert bases == {"python:3.11-slim-bookworm"}
