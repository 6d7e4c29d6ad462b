"""The lock files: exact, free of addresses, and covering pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("requirements.lock", "requirements-api.lock")
ENGINE_ONLY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "compressed-tensors",
    "safetensors",
    "numpy",
}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {_normal(name): version for name, version in (line.split("==") for line in lines)}


def _named(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {_normal(re.split(r"[\[<>=!~; ]", line)[0]) for lines in lists for line in lines}


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_one_exact_public_version(file: str) -> None:
    for line in (ROOT / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_the_lock_covers_everything_that_is_named() -> None:
    assert _named("engine", "dev") <= set(_pins("requirements.lock"))
    assert _named() <= set(_pins("requirements-api.lock"))


def test_the_api_has_no_engine() -> None:
    assert not ENGINE_ONLY & set(_pins("requirements-api.lock"))


def test_both_locks_agree() -> None:
    api = _pins("requirements-api.lock")
    assert api == {name: version for name, version in _pins("requirements.lock").items() if name in api}
