"""A key goes to the server that it is of, and never to whoever has its port by now."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cli.exits import Exit
from tests.cli.bitmill import Result, bitmill
from tests.cli.conftest import Server

KEY = "bitmill_secret"


class Stranger(ThreadingHTTPServer):
    """Another user's program on a port of this machine. It accepts everything, and notes what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Stranger)
        self.server.heard.append(f"{self.path}\n{self.headers}")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "alive", "items": [], "next_cursor": null}')

    def log_message(self, *_details: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def data(tmp_path: Path, stranger: Stranger) -> Path:
    """The data folder of a server that was killed, and whose port the stranger has."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    (folder / "credentials.json").write_text(json.dumps({"url": stranger.url, "api_key": KEY}))
    return folder


def error_of(result: Result) -> tuple[int, str]:
    return result.code, result.json["error"]["code"]


def test_the_key_of_a_server_that_died_is_not_sent(tmp_path: Path, data: Path, stranger: Stranger) -> None:
    result = bitmill(tmp_path, "jobs", "--json", DATA_DIR=str(data))
    assert error_of(result) == (Exit.UNREACHABLE, "server_unreachable")
    assert stranger.heard == []
    result = bitmill(tmp_path, "jobs", "--json", DATA_DIR=str(data), API_KEY=KEY)
    assert error_of(result) == (Exit.UNREACHABLE, "server_unreachable")
    assert stranger.heard == []


def test_the_key_of_one_server_is_not_sent_to_another(server: Server, stranger: Stranger) -> None:
    result = server.bitmill("jobs", "--json", URL=stranger.url)
    assert error_of(result) == (Exit.USAGE, "key_of_another_server")
    assert stranger.heard == []
    assert server.bitmill("jobs", URL=server.welcome["url"] + "/").code == Exit.OK


def test_without_a_server_to_name_no_key_is_sent(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "jobs", "--json", API_KEY=KEY)
    assert error_of(result) == (Exit.USAGE, "no_credentials")
    assert "BITMILL_URL" in result.json["error"]["message"]


def test_what_a_person_names_is_believed(tmp_path: Path, data: Path, stranger: Stranger) -> None:
    result = bitmill(tmp_path, "jobs", "--json", DATA_DIR=str(data), URL=stranger.url, API_KEY=KEY)
    assert result.code == Exit.OK
    assert KEY in stranger.heard[0]


@pytest.mark.parametrize("broker", ["memory://", "redis://127.0.0.1:9/0"])
def test_a_server_whose_port_is_taken_announces_nobody(
    tmp_path: Path, stranger: Stranger, broker: str
) -> None:
    data = tmp_path / "data"
    settings = {"DATA_DIR": str(data), "PORT": str(stranger.server_port), "BROKER_URL": broker}
    result = bitmill(tmp_path, "serve", "--json", **settings)
    assert error_of(result) == (Exit.FAILED, "port_taken")
    assert str(stranger.server_port) in result.json["error"]["message"]
    assert "url" not in result.json
    assert not (data / "credentials.json").exists()
    assert stranger.heard == []
