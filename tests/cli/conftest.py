"""One real server for the tests of the command line, with a model and a text that it may read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.bitmill import Result, bitmill, command, environment
from tests.support.models import tiny_dataset, tiny_model

STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A running `bitmill serve`, and its client on the same machine.

    welcome: the line that it printed when it was ready.
    """

    home: Path
    model: Path
    texts: Path
    welcome: dict[str, Any]

    def bitmill(self, *arguments: str | Path, **settings: str) -> Result:
        """A command that finds this server as commands on its machine do: through the data folder."""
        return bitmill(self.home, *arguments, **{"DATA_DIR": str(self.home / "data"), **settings})

    def submit(self, *arguments: str | Path) -> Result:
        """Submit the cheapest job there is, which is run whatever others made, with more options."""
        cheapest = ("--scheme", "W4A16", "--group-size", "32", "--no-cache")
        return self.bitmill("submit", self.model, *cheapest, *arguments)

    @property
    def calibrated(self) -> tuple[str | Path, ...]:
        """Options of a small job with data."""
        return ("--dataset", self.texts, "--num-calibration-samples", "4", "--max-seq-length", "64")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("cli")
    model = tiny_model(home / "root" / "tiny", hidden=64, intermediate=128, heads=2, kv_heads=1, head_dim=32)
    texts = tiny_dataset(home / "root" / "texts.jsonl")
    arguments = ("--port", "0", "--data-dir", home / "data", "--local-root", home / "root", "--json")
    with (
        (home / "serve.log").open("w") as log,
        subprocess.Popen(
            command("serve", *arguments),
            env=environment(home, {"DEVICE": "cpu", "WEBHOOK_ALLOWED_HOSTS": "127.0.0.1"}),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line, (home / "serve.log").read_text()
            yield Server(home, model, texts, json.loads(line))
        finally:
            process.terminate()
            code = process.wait(STOP_SECONDS)
    assert code == 0, (home / "serve.log").read_text()
