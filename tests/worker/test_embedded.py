"""What a server in one process does otherwise than a server alone. Whole ones run in tests/integration."""

from __future__ import annotations

import socket

import uvicorn

from worker.embedded import bound


def test_connections_send_at_once() -> None:
    with bound(uvicorn.Config("none", host="127.0.0.1", port=0)) as server:
        server.listen()
        with socket.create_connection(server.getsockname()):
            connection, _ = server.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
