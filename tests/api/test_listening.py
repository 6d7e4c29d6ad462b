"""Who has a port, and how commands know that it is a server of their own data folder."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from api import listening
from api.listening import CannotListen, announced, is_announced, listen, url_of
from api.server import Server

URL = "http://127.0.0.1:8080"
HOLDS = """
import sys, time
from pathlib import Path
from api.listening import announced
with announced(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_port_that_is_taken_is_refused_before_anything_listens() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(CannotListen, match=str(port)) as refused:
                listen(host, port)
            assert refused.value.code == "port_taken"
    listen("127.0.0.1", port).close()
    for host in ("no.such.host.invalid", "a..b"):
        with pytest.raises(CannotListen) as refused:
            listen(host, 0)
        assert refused.value.code == "cannot_listen"


def test_a_bound_port_queues_connections_and_answers_at_once() -> None:
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_where_a_client_on_this_machine_finds_it() -> None:
    assert url_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert url_of("::", 80) == url_of("::1", 80) == "http://[::1]:80"
    assert url_of("10.0.0.1", 80) == "http://10.0.0.1:80"


def test_a_server_is_known_while_it_listens(tmp_path: Path) -> None:
    assert not is_announced(tmp_path, URL)
    with announced(tmp_path, URL):
        assert is_announced(tmp_path, URL)
        assert not is_announced(tmp_path, "http://127.0.0.1:8081")
        assert is_announced(tmp_path, URL)
    assert not is_announced(tmp_path, URL)
    assert list((tmp_path / "listening").iterdir()) == []


def test_a_killed_server_is_not_known_and_the_next_one_is(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), URL], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "held\n"
        assert is_announced(tmp_path, URL)
        server.kill()
    assert not is_announced(tmp_path, URL)
    with announced(tmp_path, URL):
        assert is_announced(tmp_path, URL)
    assert not is_announced(tmp_path, URL)


def test_an_address_is_another_server_in_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers on one volume, or two hosts on one network home, all at 127.0.0.1:8080."""
    elsewhere = tmp_path / "another namespace"
    elsewhere.touch()
    with announced(tmp_path, URL):
        with monkeypatch.context() as patch:
            patch.setattr(listening, "_NETWORK_NAMESPACE", elsewhere)
            assert not is_announced(tmp_path, URL)
            with announced(tmp_path, URL):
                assert is_announced(tmp_path, URL)
            assert not is_announced(tmp_path, URL)
        assert is_announced(tmp_path, URL)


def test_what_a_killed_server_left_is_removed_and_a_living_ones_lock_stays(tmp_path: Path) -> None:
    with announced(tmp_path, URL):
        folder = tmp_path / "listening"
        mine = next(folder.iterdir())
        left = mine.with_name(mine.name.replace("8080", "8082"))
        of_another_machine = folder / "another-boot-1-127.0.0.1:8080.lock"
        left.touch()
        of_another_machine.touch()
        with announced(tmp_path, "http://127.0.0.1:8081"):
            assert is_announced(tmp_path, URL)
            assert not left.exists()
            assert of_another_machine.exists()


def test_a_lock_file_that_cannot_be_removed_ends_nothing(tmp_path: Path) -> None:
    with announced(tmp_path, URL):
        next((tmp_path / "listening").iterdir()).unlink()
    with capture_logs() as records, announced(tmp_path, URL):
        file = next((tmp_path / "listening").iterdir())
        file.unlink()
        file.mkdir()
    assert [record["event"] for record in records] == ["lock_file_not_removed"]


def test_a_server_without_its_lock_answers_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_PATIENCE_SECONDS", 0.1)
    answers = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        url = url_of(*listener.getsockname())
        with announced(tmp_path, url), capture_logs() as records:
            server = Server(FastAPI(), listener, tmp_path, lambda _url: answers.set())
            thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
            thread.start()
            assert answers.wait(10)
            assert httpx.get(f"{url}/openapi.json").status_code == 200
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
    assert [record["event"] for record in records] == ["not_announced"]
