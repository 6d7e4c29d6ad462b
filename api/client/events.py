"""Server-Sent Events, as far as the API sends them."""

from __future__ import annotations

import json
from collections.abc import Iterator

from api.client.types import EventRead


class EventReader:
    """Puts messages together from the bytes of one stream, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def events(self, chunk: bytes) -> Iterator[EventRead]:
        """The events that are whole with this chunk. A message's `data` is an event; comments have none."""
        *messages, self._rest = (self._rest + chunk).split(b"\n\n")
        for message in messages:
            data = [line.partition(b":")[2] for line in message.split(b"\n") if line.startswith(b"data:")]
            if data:
                yield json.loads(b"\n".join(data))
