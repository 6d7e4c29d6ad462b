"""Commands that the documents show exist, with the options that they show."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from api.jobs.submission.request import JobSubmit
from api.main import create_app
from api.settings import Settings
from cli.main import app
from compression.__main__ import parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deploy" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[str]:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    return [code for found, code in _BLOCK.findall(text) if found == language]


def _shown(program: str) -> list[list[str]]:
    """The words after `program` of every shell line that runs it; continuation lines are joined."""
    lines = "".join(_blocks("sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.strip()]
    found = []
    for words in commands:
        start = program.split()
        for index in range(len(words)):
            if words[index : index + len(start)] == start:
                found.append(words[index + len(start) :])
                break
    return found


def _options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


def _command(words: list[str]) -> Any:
    """The command that these words name, going down into groups."""
    command: Any = get_command(app)
    for word in words:
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        command = command.commands[word]
    return command


@pytest.mark.parametrize("words", _shown("bitmill"), ids=" ".join)
def test_a_shown_command_of_bitmill_exists(words: list[str]) -> None:
    command = _command(words)
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert _options(words) <= known


def test_every_command_is_shown() -> None:
    shown = {_command(words).name for words in _shown("bitmill")}
    alone = {"serve", "worker", "submit", "jobs", "cancel", "download", "methods", "doctor"}
    assert alone | {"upgrade", "list", "show"} <= shown
    assert {"add", "list", "remove", "ping", "deliveries", "redeliver"} <= shown


@pytest.mark.parametrize("words", _shown("python -m compression"), ids=" ".join)
def test_a_shown_command_of_the_engine_is_accepted(words: list[str]) -> None:
    parser().parse_args(words)


@pytest.mark.parametrize("words", _shown("make"), ids=" ".join)
def test_a_shown_make_target_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shown_variable_is_a_setting(document: Path) -> None:
    shown = set(re.findall(r"\bBITMILL_[A-Z_]+\b", document.read_text(encoding="utf-8")))
    assert shown <= {f"BITMILL_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("body", _blocks("json"))
def test_a_shown_request_is_valid(body: str) -> None:
    JobSubmit.model_validate(json.loads(body))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), link


def test_the_api_page_lists_every_call(tmp_path: Path) -> None:
    paths = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", page)) == operations
