"""Sends messages to webhooks, beside the jobs of every worker. api/webhooks/outbox.py says what is due.

A slow receiver blocks at most two of the threads, so it delays only its own messages.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version

import httpx
import structlog

from api.database import Database
from api.errors import Unprocessable
from api.settings import Settings
from api.webhooks import outbox
from api.webhooks.addresses import LookUp, Target, look_up, resolve
from api.webhooks.outbox import Answer, Message
from api.webhooks.signing import headers

POLL_SECONDS = 2.0
ATTEMPT_SECONDS = 10.0
"""For all of an attempt, from the connection to the end of the answer."""
_THREADS = 16
_THREADS_EACH = 2
_ANSWER_BYTES = 64 << 10
_ERROR_CHARACTERS = 500
_USER_AGENT = f"bitmill/{version('bitmill')}"

log = structlog.get_logger(__name__)


class Sender:
    """Sends what is due in threads of its own, several messages at a time."""

    def __init__(self, database: Database, settings: Settings, *, look_up: LookUp = look_up) -> None:
        self._database = database
        self._settings = settings
        self._look_up = look_up
        self._tls = httpx.create_ssl_context()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="webhooks")
        self._busy: Counter[str] = Counter()  # messages that are being sent, by webhook
        self._closed = False
        self._taking = threading.Lock()

    def send_due(self) -> None:
        """Start sending what is due, in as many threads as are free. Each goes on until nothing is due."""
        while (message := self._take()) is not None:
            self._pool.submit(self._send_on, message)

    def close(self) -> None:
        """Start no more, and return when every message in flight has been answered."""
        with self._taking:
            self._closed = True
        self._pool.shutdown()

    def _take(self) -> Message | None:
        with self._taking:
            if self._closed or self._busy.total() == _THREADS:
                return None
            busy = [webhook for webhook, count in self._busy.items() if count == _THREADS_EACH]
            with self._database.read() as session:
                if not outbox.is_due(session, busy=busy):
                    return None  # the usual case; reading takes no lock of SQLite
            with self._database.write() as session:
                message = outbox.claim(session, busy=busy)
            if message is not None:
                self._busy[message.webhook_id] += 1
            return message

    def _send_on(self, first: Message) -> None:
        message: Message | None = first
        try:
            while message is not None:
                with self._released(message):
                    self._send(message)
                message = self._take()
        except Exception:  # a claimed message is due again when its claim expires
            log.exception("sender_failed")

    @contextmanager
    def _released(self, message: Message) -> Iterator[None]:
        """Give the webhook's thread back when the block ends."""
        try:
            yield
        finally:
            with self._taking:
                self._busy[message.webhook_id] -= 1

    def _send(self, message: Message) -> None:
        answer = self._attempt(message)
        with self._database.write() as session:
            outbox.settle(session, message, answer)
        log.info(
            "webhook_sent",
            delivery_id=message.id,
            webhook_id=message.webhook_id,
            attempt=message.attempt,
            status=answer.status_code,
            error=answer.error,
        )

    def _attempt(self, message: Message) -> Answer:
        try:
            target = resolve(message.url, self._settings.webhook_allowed_hosts, self._look_up)
            return Answer(asyncio.run(_post(message, target, self._tls)))
        except Unprocessable as refused:
            return Answer(error=refused.message)
        except TimeoutError:
            return Answer(error=f"The receiver did not answer within {ATTEMPT_SECONDS:g} seconds.")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Answer(error=f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS])


async def _post(message: Message, target: Target, tls: ssl.SSLContext) -> int:
    """Send a message to the checked address, and return the status of the answer. Its body is discarded.

    Host, SNI and the certificate's name stay those of the URL. Neither redirects nor proxies are followed.
    """
    async with (
        asyncio.timeout(ATTEMPT_SECONDS),
        httpx.AsyncClient(verify=tls, trust_env=False, timeout=ATTEMPT_SECONDS) as client,
    ):
        request = client.build_request(
            "POST",
            target.url,
            content=message.body,
            headers={
                "Content-Type": "application/json",
                "User-Agent": _USER_AGENT,
                **headers(message.secret, message.id, message.at, message.body),
            },
            extensions={"sni_hostname": target.url.raw_host.decode("ascii")},
        )
        request.url = target.url.copy_with(host=target.address)
        answer = await client.send(request, stream=True)
        try:
            await _discard(answer)
        finally:
            await answer.aclose()
        return answer.status_code


async def _discard(answer: httpx.Response) -> None:
    """Read a body up to _ANSWER_BYTES: some receivers fail when nobody reads."""
    received = 0
    async for chunk in answer.aiter_raw():
        received += len(chunk)
        if received > _ANSWER_BYTES:
            return
