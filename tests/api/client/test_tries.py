"""What both clients do when a connection breaks, or a server says that they should come again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.client import ApiError, DigestMismatch
from tests.api.client.conftest import Asked, Connect, Scripted, answer

JOB = json.dumps({"id": "job_1", "status": "queued"}).encode()
NOTHING = b""
CONTENT = b"0123456789" * 350
FILES = json.dumps(
    {"files": [{"name": "file", "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}]}
).encode()


def problem(status: int, code: str, **headers: str) -> bytes:
    said = {"code": code, "detail": "It is so.", "hint": "Wait.", "errors": [], "request_id": "1"}
    return answer(status, json.dumps(said).encode(), Content_Type="application/problem+json", **headers)


BUSY = problem(503, "database_unavailable", Retry_After="0")
LIMITED = problem(429, "rate_limited", Retry_After="0")


def ask(
    connect: Connect, answers: list[bytes], call: str, *args: Any, **options: Any
) -> tuple[Any, list[Asked]]:
    """What a call gives, or raises, when it is answered so; and what was asked."""
    server = Scripted(answers)
    with server.running() as url, connect(url, "key", **options) as client:
        came = error = None
        try:
            came = getattr(client, call)(*args)
            came = came if isinstance(came, dict | None) else list(came)
        except (ApiError, httpx.TransportError, DigestMismatch) as caught:
            error = caught
    return error or came, server.asked


@pytest.mark.parametrize("trouble", [NOTHING, BUSY, LIMITED], ids=["broken", "503", "429"])
def test_a_job_is_sent_again_under_the_same_key(connect: Connect, trouble: bytes) -> None:
    job, asked = ask(connect, [trouble, trouble, answer(202, JOB)], "submit", {"model": "m"})
    assert job["id"] == "job_1"
    assert {(each.line, each.body) for each in asked} == {("POST /v1/jobs", '{"model":"m"}')}
    (key,) = {each.headers["idempotency-key"] for each in asked}
    assert len(key) == 32


def test_each_call_has_a_key_of_its_own(connect: Connect) -> None:
    keys = [ask(connect, [answer(202, JOB)], "submit", {})[1][0].headers["idempotency-key"] for _ in range(2)]
    assert keys[0] != keys[1]


def test_a_question_is_asked_again(connect: Connect) -> None:
    job, asked = ask(connect, [NOTHING, BUSY, LIMITED, answer(200, JOB)], "job", "job_1")
    assert job["id"] == "job_1"
    assert [each.line for each in asked] == ["GET /v1/jobs/job_1"] * 4


@pytest.mark.parametrize("call", ["retry", "ping_webhook", "delete"])
def test_what_may_have_been_done_is_not_sent_again(connect: Connect, call: str) -> None:
    broken, asked = ask(connect, [NOTHING], call, "x")
    assert (type(broken), len(asked)) == (httpx.RemoteProtocolError, 1)
    busy, asked = ask(connect, [BUSY], call, "x")
    assert (busy.code, len(asked)) == ("database_unavailable", 1)
    again, asked = ask(connect, [LIMITED, answer(202, JOB)], call, "x")
    assert (again is None or again["id"] == "job_1", len(asked)) == (True, 2)


@pytest.mark.parametrize(
    "said", [{}, {"Retry_After": "61"}, {"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}]
)
def test_it_waits_no_longer_than_it_was_told_and_may(connect: Connect, said: dict[str, str]) -> None:
    error, asked = ask(connect, [problem(429, "quota_queued", **said)], "submit", {})
    assert (error.status, error.code, len(asked)) == (429, "quota_queued", 1)


def test_patience_ends(connect: Connect) -> None:
    error, asked = ask(connect, [NOTHING], "job", "x", retry_seconds=0)
    assert (type(error), len(asked)) == (httpx.RemoteProtocolError, 1)
    error, asked = ask(connect, [NOTHING] * 2, "job", "x", retry_seconds=0.25)
    assert (type(error), len(asked)) == (httpx.RemoteProtocolError, 2)


def test_no_server(connect: Connect) -> None:
    with (
        connect("http://127.0.0.1:1", "key", retry_seconds=0) as client,
        pytest.raises(httpx.ConnectError),
    ):
        client.project()


def test_what_is_not_bitmill(connect: Connect) -> None:
    error, _ = ask(connect, [answer(404, b"<html>", Content_Type="text/html")], "project")
    assert (error.status, error.code, error.hint) == (404, "not_bitmill", "Check the server's URL.")


def stream(*seqs: int, ended: bool = False, promised: int | None = None) -> bytes:
    """A stream of those events, the last of which may end the job; cut short where more is promised."""
    types = dict.fromkeys(seqs, "warning") | ({seqs[-1]: "job_failed"} if ended else {})
    text = "".join(
        f"event: {type}\ndata: {json.dumps({'seq': seq, 'type': type})}\nid: {seq}\n\n: still here\n\n"
        for seq, type in types.items()
    )
    return answer(200, text.encode() + b'event: warning\ndata: {"se' * bool(promised), promised=promised)


@pytest.mark.parametrize("promised", [None, 9999], ids=["ends", "breaks"])
def test_a_stream_is_taken_up_behind_the_last_event(connect: Connect, promised: int | None) -> None:
    answers = [stream(4, 5, promised=promised), BUSY, stream(6, 7, ended=True)]
    server = Scripted(answers)
    with server.running() as url, connect(url, "key") as client:
        assert [event["seq"] for event in client.follow("job_1", since=3)] == [4, 5, 6, 7]
    assert [each.headers["last-event-id"] for each in server.asked] == ["3", "5", "5"]
    assert {each.headers["accept"] for each in server.asked} == {"text/event-stream"}


def test_a_stream_whose_job_has_ended_meanwhile(connect: Connect) -> None:
    seen, asked = ask(connect, [stream(1, 2, promised=9999), answer(204)], "follow", "job_1")
    assert ([event["seq"] for event in seen], len(asked)) == ([1, 2], 2)


def test_streams_that_end_at_once_are_not_read_forever(connect: Connect) -> None:
    error, _ = ask(connect, [answer(200)] * 2, "follow", "job_1", retry_seconds=0.25)
    assert "ended before the job" in str(error)


def test_messages_however_they_are_cut() -> None:
    from api.client.events import EventReader

    whole = b'event: a\ndata: {"seq": 1}\nid: 1\n\n: comment\n\nevent: b\ndata: {"seq": 2}\nid: 2\n\n'
    for size in range(1, len(whole)):
        reader = EventReader()
        chunks = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
        assert [event for chunk in chunks for event in reader.events(chunk)] == [{"seq": 1}, {"seq": 2}]


def rest(start: int, sent: int) -> bytes:
    """The file from there on, of which so much comes before the connection breaks."""
    return answer(206 if start else 200, CONTENT[start:][:sent], promised=len(CONTENT) - start)


def test_a_download_goes_on_where_it_broke(connect: Connect, tmp_path: Path) -> None:
    target = tmp_path / "file"
    answers = [answer(200, FILES), *(rest(start, 1000) for start in (0, 1000, 2000, 3000))]
    came, asked = ask(connect, answers, "download", "job_1", "file", target)
    assert came is None
    assert target.read_bytes() == CONTENT
    ranges = [each.headers.get("range") for each in asked[1:]]
    assert ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_a_file_with_another_digest_is_fetched_anew_once(connect: Connect, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"x" * 1000)
    answers = [answer(200, FILES), rest(1000, 9999), rest(0, 9999)]
    assert ask(connect, answers, "download", "job_1", "file", target)[0] is None
    assert target.read_bytes() == CONTENT
    target.unlink()
    wrong = answer(200, b"y" * len(CONTENT))
    error, _ = ask(connect, [answer(200, FILES), wrong, wrong], "download", "job_1", "file", target)
    assert isinstance(error, DigestMismatch)
    assert not target.exists()
