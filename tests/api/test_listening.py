"""Who has a port, and how commands know that it is a server of their own data folder."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from api.listening import CannotListen, announced, is_announced, listen, url_of

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
    with pytest.raises(CannotListen) as refused:
        listen("no.such.host.invalid", 0)
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
