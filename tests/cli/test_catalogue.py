"""methods, schemes and datasets, against a real server."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Server


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [("methods", "gptq", "High recovery"), ("schemes", "W8A8", "W8A8, INT8, W8A8-INT8")],
)
def test_what_a_recipe_may_say(server: Server, command: str, name: str, shown: str) -> None:
    assert name in [row["name"] for row in server.bitmill(command, "--json").json[command]]
    assert shown in server.bitmill(command).out


def test_datasets_and_why_some_are_not_available(server: Server) -> None:
    found = server.bitmill("datasets", "--json").json
    available = {row["kind"]: row["available"] for row in found["items"]}
    assert available == {"path": True, "hub": True, "s3": False, "texts": True, "self": True}
    table = server.bitmill("datasets").out
    assert "The server has no BITMILL_S3_PREFIXES." in table
    assert "HuggingFaceH4/ultrachat_200k" in table
