"""Which ends of a process are retried: those that somebody else brought about, and no fault of its own."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from api.jobs.ledger.models import Attempt, Job, JobStatus
from api.private import mode_of
from api.settings import Settings
from compression.recipe import Recipe
from tests.support.postgres import PostgresServer, new_database
from tests.worker.conftest import Submit, queue
from worker import outcomes
from worker.context import WorkerContext
from worker.engine import WorkProcess
from worker.heartbeat import Presence
from worker.messages import BadMessage, parse
from worker.runner import EngineSpec
from worker.tasks import run_jobs

Misbehave = Callable[[str], None]
HOOK = """
import sys
if "worker.runner" in sys.orig_argv:
    import os, signal
    {code}
"""


@pytest.fixture
def misbehave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Misbehave:
    """Has real engine processes run this code when they start."""

    def make(code: str) -> None:
        body = "\n    ".join(code.strip().splitlines())
        (tmp_path / "sitecustomize.py").write_text(HOOK.format(code=body))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))

    return make


def run_once(worker: WorkerContext, job_id: str) -> tuple[Job, Attempt]:
    """The job after one attempt."""
    run_jobs(worker, Presence(worker))
    with worker.database.read() as session:
        return session.get_one(Job, job_id), session.get_one(Attempt, (job_id, 1))


BEGINS = """
import compression
from compression.events import PhaseChanged
def compress(*_, on_event, **__): on_event(PhaseChanged("plan")); {}
compression.compress = compress
"""


# Before main: an exit, or what the process does to itself.
@pytest.mark.parametrize(
    ("code", "error", "status"),
    [
        (
            "print('a last word', file=sys.stderr); sys.stderr.flush(); os._exit(3)",
            "host_failed",
            "queued",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "host_failed", "queued"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "engine_crashed", "queued"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "engine_crashed", "queued"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 2)", "engine_crashed", "queued"),
        (BEGINS.format("os._exit(3)"), "engine_crashed", "failed"),
        (BEGINS.format("os.kill(os.getpid(), signal.SIGSEGV)"), "engine_crashed", "failed"),
        ("import compression; compression.compress = lambda *_, **__: os._exit(3)", "host_failed", "queued"),
        ("sys.modules['compression.pipeline'] = None", "host_failed", "queued"),
    ],
)
def test_a_process_is_retried_that_was_killed_or_never_began(
    worker: WorkerContext, submit: Submit, misbehave: Misbehave, code: str, error: str, status: str
) -> None:
    misbehave(code)
    job, attempt = run_once(worker, submit())
    assert (attempt.error_code, job.status) == (error, JobStatus(status))
    assert job.attempts_counted == (0 if error == "host_failed" else 1)
    if "last word" in code:
        assert "exit code 3" in (attempt.error_message or "")
        assert "a last word" in (attempt.error_message or "")


RAISES = """
import compression
def compress(*_args, **_kwargs): raise {error}
compression.compress = compress
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("KeyError('half a pair \\ud83d, a zero \\0')", "KeyError: "),
        ("RecursionError('too deep')", "RecursionError: nested too deeply"),
        ("SystemExit(7)", "SystemExit: 7"),
        ("type('PanicException', (BaseException,), {})('Rust panicked')", "PanicException: Rust panicked"),
    ],
)
def test_an_exception_fails_the_job_at_once_and_says_where_to_report(
    worker: WorkerContext, submit: Submit, misbehave: Misbehave, error: str, told: str
) -> None:
    misbehave(RAISES.format(error=error))
    job, attempt = run_once(worker, submit())
    assert (attempt.error_code, job.status, job.error_code) == ("engine_error", "failed", "engine_error")
    assert job.error_message is not None
    assert job.error_message.startswith(told)
    assert "report it" in job.error_message


def test_what_no_database_can_keep_is_replaced_and_costs_no_lease(
    tmp_path: Path, tiny_llama: Path, postgres: PostgresServer, misbehave: Misbehave
) -> None:
    misbehave(RAISES.format(error="compression.CompressionError('odd', 'half \\ud83d and \\0 zero')"))
    with new_database(postgres) as url:
        settings = Settings(
            data_dir=tmp_path / "data", local_roots=(tiny_llama.parent,), device="cpu", database_url=url
        )
        worker = WorkerContext.open(settings)
        with capture_logs():
            job, _ = run_once(worker, queue(worker, model=str(tiny_llama), scheme="W8A8"))
        worker.close()
    assert (job.status, job.error_code) == ("failed", "odd")
    assert "half \\ud83d and \ufffd zero" in (job.error_message or "")


WRITES = """
import compression, time
pipe = os.dup(1)
def compress(*_args, **_kwargs): os.write(pipe, {line!r} + bytes([10])); time.sleep(600)
compression.compress = compress
"""


def test_a_line_that_is_no_message_fails_the_job_at_once(
    worker: WorkerContext, submit: Submit, misbehave: Misbehave
) -> None:
    misbehave(WRITES.format(line=b"not a message"))
    started = time.monotonic()
    job, attempt = run_once(worker, submit())
    assert time.monotonic() - started < 60  # nobody waits for the engine
    assert (attempt.error_code, job.status) == ("engine_error", "failed")
    assert "not a message" in (job.error_message or "")


@pytest.mark.parametrize("line", [b"not json", b'"text"', b'{"type": "warning"}', b"[" * 100_000, b"\xff"])
def test_what_is_no_message(line: bytes) -> None:
    with pytest.raises(BadMessage):
        parse(line)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[str], WorkProcess]]:
    started = []

    def start(code: str) -> WorkProcess:
        recipe = Recipe.from_short("W8A8", has_dataset=False)
        spec = EngineSpec(source=tmp_path, recipe=recipe, output_dir=tmp_path / "output")
        command = (sys.executable, "-c", code)
        started.append(WorkProcess("engine", spec, tmp_path, command, {"PATH": os.defpath}, umask=0o077))
        return started[-1]

    yield start
    for engine in started:
        engine.kill()


def test_messages_around_a_bad_line_are_read(process: Callable[[str], WorkProcess]) -> None:
    engine = process('print(\'{"type": "a", "data": {"x": NaN}}\\n!\\n{"type": "b", "data": {}}\')')
    assert engine.next_message(10) == {"type": "a", "data": {"x": None}}
    with pytest.raises(BadMessage, match="!"):
        engine.next_message(10)
    assert engine.next_message(10) == {"type": "b", "data": {}}
    with pytest.raises(EOFError):
        engine.next_message(10)


def test_what_an_engine_writes_is_private(process: Callable[[str], WorkProcess], tmp_path: Path) -> None:
    engine = process("import os; os.mkdir('folder'); open('file', 'w')")
    assert engine.finish() == 0
    for name in ("file", "spec.json", "engine.log"):
        assert mode_of(tmp_path / name) == 0o600
    assert mode_of(tmp_path / "folder") == 0o700


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (MemoryError(), True),
        (OSError(errno.ENAMETOOLONG, "File name too long"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (RecursionError("maximum recursion depth exceeded"), False),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), False),
    ],
)
def test_a_fault_of_the_worker_is_retried_where_it_is_about_the_moment(
    error: Exception, retried: bool
) -> None:
    with capture_logs():
        failure = outcomes._failure(error)
    assert (failure.code, failure.retryable) == ("worker_error", retried)
    assert failure.message.startswith(f"{type(error).__name__}: ")
    assert "Report it" in failure.message
