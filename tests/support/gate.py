"""A port in front of a server, for tests of what happens when a server goes away and comes back."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import Self


class Gate:
    """Forwards connections to a port of this machine, until it is shut.

    store_url: of a store on that server, for who connects through here.
    rate: how many bytes of a client go through in a second, if not as many as there are.
    sent: bytes that came from clients. shut_after, hold_after: it does so by itself when more of them came.
    replace: bytes of a client, and what the server gets for them.
    """

    def __init__(self, target: int, store_url: str) -> None:
        self.store_url = store_url
        self.rate: int | None = None
        self.sent = 0
        self.shut_after: int | None = None
        self.hold_after: int | None = None
        self.replace = (b"", b"")
        self._target = target
        self._flowing = threading.Event()
        self._flowing.set()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._listen()

    @property
    def is_shut(self) -> bool:
        return self._listener.fileno() == -1

    @property
    def is_held(self) -> bool:
        return not self._flowing.is_set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Break every connection and refuse new ones."""
        for connection in (self._listener, *self._connections):
            _end(connection)
        self._flowing.set()

    def open(self) -> None:
        """Forward again, on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listen()

    def hold(self) -> None:
        """Keep connections, and let nothing through any more."""
        self._flowing.clear()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is gone, which a client sees as a connection that breaks
                _end(client)
                continue
            self._connections |= {client, server}
            for args in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=args, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        try:
            while chunk := source.recv(1 << 16):
                if from_client:
                    chunk = chunk.replace(*self.replace) if self.replace[0] else chunk
                    self.sent += len(chunk)
                    if self.hold_after is not None and self.sent > self.hold_after:
                        self.hold()
                    if self.shut_after is not None and self.sent > self.shut_after:
                        self.shut_after = None
                        self.shut()
                    if self.rate is not None:
                        time.sleep(len(chunk) / self.rate)
                self._flowing.wait()
                sink.sendall(chunk)
        except OSError:
            pass
        finally:
            for connection in (source, sink):
                _end(connection)
                self._connections.discard(connection)


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        connection.close()
