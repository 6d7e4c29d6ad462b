"""What goes wrong, and the exit code that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cli.exits import Exit
from cli.main import app
from tests.cli.bitmill import bitmill
from tests.cli.conftest import Server

NOBODY = "http://127.0.0.1:9"


def test_no_server_is_exit_code_3(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "jobs", URL=NOBODY, API_KEY="bitmill_x")
    assert result.code == Exit.UNREACHABLE
    assert "server_unreachable" in result.err
    assert "bitmill serve" in result.err
    assert result.out == ""


def test_with_json_an_error_is_one_json_document_too(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "jobs", "--json", URL=NOBODY, API_KEY="bitmill_x")
    assert result.code == Exit.UNREACHABLE
    assert result.json["error"]["code"] == "server_unreachable"


def test_no_credentials_is_wrong_usage(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "jobs", "--json")
    assert (result.code, result.json["error"]["code"]) == (Exit.USAGE, "no_credentials")


def test_a_wrong_key_is_refused(server: Server) -> None:
    result = server.bitmill("jobs", "--json", API_KEY="bitmill_wrong")
    assert (result.code, result.json["error"]["code"]) == (Exit.REFUSED, "wrong_key")


def test_an_unknown_job_is_refused(server: Server) -> None:
    for arguments in (("cancel", "job_x"), ("download", "job_x", "--output-dir", "nowhere")):
        result = server.bitmill(*arguments, "--json")
        assert (result.code, result.json["error"]["code"]) == (Exit.REFUSED, "job_not_found")


def test_a_job_that_cannot_succeed_is_refused_with_what_would(server: Server) -> None:
    result = server.bitmill("submit", server.model, "--scheme", "W5A16", "--json")
    assert result.code == Exit.REFUSED
    assert result.json["error"]["code"] == "unknown_scheme"
    assert "W4A16" in result.json["error"]["hint"]


def test_every_problem_of_a_request_is_shown(server: Server) -> None:
    result = server.bitmill("submit", server.home, "--scheme", "W5A16")
    assert result.code == Exit.REFUSED
    assert "W5A16" in result.err
    assert "root" in result.err


def test_a_bad_option_is_wrong_usage(server: Server) -> None:
    assert server.bitmill("submit", server.model, "--no-such-option").code == Exit.USAGE
    assert server.submit("--label", "no equals sign", "--json").json["error"]["code"] == "bad_options"
    assert server.submit("--text-column", "text").code == Exit.USAGE


def test_a_bad_setting_is_named(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "jobs", "--json", PORT="eighty")
    assert (result.code, result.json["error"]["code"]) == (Exit.USAGE, "bad_setting")
    assert "BITMILL_PORT" in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("command", "broker"),
    [("serve", "memory://"), ("serve", "redis://127.0.0.1:9/0"), ("worker", "redis://127.0.0.1:9/0")],
)
def test_a_store_that_is_none_is_named(tmp_path: Path, command: str, broker: str) -> None:
    result = bitmill(tmp_path, command, "--json", STORE_URL="ftp://nowhere", BROKER_URL=broker)
    assert (result.code, result.json["error"]["code"]) == (Exit.USAGE, "unknown_store")
    assert result.json["error"]["message"] == "BITMILL_STORE_URL: 'ftp://nowhere' is not a store."
    assert "s3://bucket/folder" in result.json["error"]["hint"]
    assert "Traceback" not in result.err


@pytest.mark.parametrize("url", ["nonsense", "nosuch://somewhere/bitmill"])
def test_a_database_that_is_none_is_named(tmp_path: Path, url: str) -> None:
    result = bitmill(tmp_path, "serve", "--json", DATABASE_URL=url, BROKER_URL="redis://127.0.0.1:9/0")
    assert (result.code, result.json["error"]["code"]) == (Exit.USAGE, "unknown_database")
    assert "BITMILL_DATABASE_URL" in result.json["error"]["message"]
    assert "Traceback" not in result.err


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that name it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, each in command.commands.items():
        yield from commands(each, (*path, name))


def test_every_command_takes_json() -> None:
    found = dict(commands(get_command(app)))
    assert len(found) > 25
    for path, command in found.items():
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, path


def test_help_says_what_exit_codes_mean() -> None:
    told = {int(code) for code in re.findall(r"(\d) ", str(get_command(app).epilog))}
    assert told == {code.value for code in Exit if code != Exit.INTERRUPTED}


def test_a_worker_on_the_embedded_broker_is_refused(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "worker", "--json")
    assert (result.code, result.json["error"]["code"]) == (Exit.USAGE, "broker_is_embedded")


def test_two_servers_on_one_data_folder_are_one_too_many(server: Server) -> None:
    result = server.bitmill("serve", "--port", "0", "--json")
    assert (result.code, result.json["error"]["code"]) == (Exit.FAILED, "already_served")


def test_an_embedded_server_wants_its_database_for_itself(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "serve", "--json", DATABASE_URL="postgresql://somewhere/bitmill")
    assert (result.code, result.json["error"]["code"]) == (Exit.FAILED, "broker_needed")


@pytest.mark.parametrize(
    ("command", "setting", "code"),
    [
        (("serve",), "DATA_DIR", "data_dir_not_writable"),
        (("db", "upgrade"), "DATA_DIR", "data_dir_not_writable"),
        (("worker",), "DATA_DIR", "data_dir_not_writable"),
        (("worker",), "SCRATCH_DIR", "scratch_dir_not_writable"),
        (("worker",), "STORE_URL", "store_denied"),
        (("serve",), "DATABASE_URL", "database_failed"),
        (("db", "upgrade"), "DATABASE_URL", "database_failed"),
    ],
)
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, command: tuple[str, ...], setting: str, code: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    prefix = {"STORE_URL": "file://", "DATABASE_URL": "sqlite:///"}.get(setting, "")
    settings = {"DATA_DIR": str(tmp_path / "data"), "BROKER_URL": "redis://127.0.0.1:9/0"}
    result = bitmill(tmp_path, *command, "--json", **{**settings, setting: f"{prefix}{file}/a/b"})
    assert result.json["error"]["code"] == code
    assert str(file) in result.json["error"]["message"]
    assert "Traceback" not in result.err
