"""What becomes of exceptions that are not ours, and what passes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer

from compression import Recipe, compress, plan
from compression.boundary import MAX_JSON_DEPTH, foreign, last_resort, parse_json, reason, writing
from compression.errors import (
    CompressionError,
    NumericalError,
    PlanError,
    Problem,
    ResourceError,
    SourceError,
    UnexpectedError,
)
from compression.events import Event, LayerReplayed, PhaseChanged
from compression.families.configuration import as_read
from compression.families.families import FAMILIES

RTN = Recipe.model_validate([{"type": "rtn", "scheme": "FP8_DYNAMIC"}])


def raised(error: BaseException) -> CompressionError:
    with pytest.raises(CompressionError) as caught, foreign("some_code", "Row 3 cannot be read", "Mend it."):
        raise error
    return caught.value


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


Panic.__name__ = "PanicException"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Exception("bad\n  file"), "bad file"),
        (KeyError("model"), "KeyError: 'model'"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (RecursionError("maximum recursion depth"), "nested too deeply"),
        (OSError(errno.EIO, "Input/output error", "/secret/place"), "Input/output error"),
        (ValueError("half \ud83d"), r"half \ud83d"),
        (ValueError(), "ValueError"),
        (Panic("index out of bounds"), "index out of bounds"),
    ],
)
def test_a_library_fails(error: BaseException, why: str) -> None:
    ours = raised(error)
    assert isinstance(ours, SourceError)
    assert (ours.code, ours.message, ours.hint) == (
        "some_code",
        f"Row 3 cannot be read: {why}.",
        "Mend it.",
    )
    assert ours.__cause__ is error
    str(ours).encode()


def test_what_no_input_is_to_blame_for_passes() -> None:
    for error in (
        NumericalError("non_finite_weights", "It holds NaN."),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, foreign("some_code", "It"):
            raise error
        assert caught.value is error


def test_a_fault_of_ours_is_not_told_as_one_of_the_input() -> None:
    """Where a library calls code of this package; `as_read` stands for that."""
    with pytest.raises(AttributeError), foreign("config_invalid", "It", calls_ours=True):
        as_read(cast(Any, None), FAMILIES["llama"])
    with pytest.raises(SourceError), foreign("config_invalid", "It", calls_ours=True):
        json.loads("{")


def test_a_real_panic_of_a_library_in_rust_does_not_pass() -> None:
    """A tokenizer whose vocabulary lacks a token that its merges make panics or refuses: never raw."""
    with pytest.raises(SourceError), foreign("tokenizer_invalid", "It cannot be read"):
        Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}')


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, "disk_full") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        *((number, "output_not_writable") for number in (errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)),
    ],
)
def test_a_file_that_cannot_be_written_is_named(number: int, code: str) -> None:
    with pytest.raises(ResourceError) as caught, writing(Path("/somewhere/config.json")):
        raise OSError(number, os.strerror(number))
    assert (caught.value.code, "config.json" in caught.value.message) == (code, True)
    assert "/somewhere" not in caught.value.message


def test_json_of_strangers() -> None:
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(deepest) == parse_json(deepest.encode())
    for text in (f"[{deepest}]", f'{{"a": {deepest}}}', "[" * 100_000, "[" * 3000 + "]" * 3000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    assert parse_json(r'{"a": "\ud83d"}') == {"a": "\ud83d"}
    for bad in (r'["\ud83d"]', r'{"\uDFFF": 1}'):
        with pytest.raises(ValueError, match="surrogates"):
            parse_json(bad, whole_characters=True)
    assert parse_json(r'["\ud83d\ude00"]', whole_characters=True) == ["\U0001f600"]
    for bad in ("", "{", "1" * 5000, b"\xff", '{"a": 1'):
        with pytest.raises(ValueError, match=r".+"):
            parse_json(bad)


def outcome(work: Callable[[], object]) -> BaseException:
    try:
        last_resort(work)()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_nobody_foresaw_is_named_with_its_type_and_place() -> None:
    def work() -> None:
        raise LookupError("no such thing")

    error = outcome(work)
    assert isinstance(error, UnexpectedError)
    assert error.code == "engine_error"
    assert "LookupError: no such thing (test_boundary.py:" in error.message
    assert isinstance(error.__cause__, LookupError)


def test_the_machine_is_to_blame() -> None:
    def no_memory() -> None:
        raise MemoryError

    def no_memory_of_torch() -> None:
        torch.empty(1 << 62, dtype=torch.uint8)

    def no_memory_of_the_system() -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def no_room() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/activations")

    without = (no_memory, no_memory_of_torch, no_memory_of_the_system)
    for work, code in (*((work, "out_of_memory") for work in without), (no_room, "disk_full")):
        error = outcome(work)
        assert isinstance(error, ResourceError)
        assert error.code == code


def test_ours_and_the_callers_own_errors_pass_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_event: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        compress(tiny_llama, RTN, tmp_path / "out", on_event=stop)
    with pytest.raises(KeyboardInterrupt):
        compress(
            tiny_llama, RTN, tmp_path / "out", on_event=lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    refusal = PlanError(Problem("some_code", "It is so."))

    def refuse(_folder: Path) -> None:
        raise refusal

    with pytest.raises(PlanError) as caught:
        plan(tiny_llama, RTN, look=refuse)  # type: ignore[arg-type]
    assert caught.value.code == "some_code"


def test_plan_lets_nothing_raw_out(tiny_llama: Path) -> None:
    def fail(_folder: Path) -> None:
        raise AttributeError("nothing")

    with pytest.raises(UnexpectedError, match="AttributeError: nothing"):
        plan(tiny_llama, RTN, look=fail)  # type: ignore[arg-type]


def test_messages_can_be_stored() -> None:
    """Names of strangers are quoted in them."""
    Problem("some_code", "\ud83d").message.encode()
    str(SourceError("some_code", "\ud83d")).encode()
    assert reason(ValueError("x" * 1000)).endswith("xxx (shortened)")


@pytest.mark.parametrize(
    "output",
    [
        *("texts.jsonl/out", "n" * 250, "n" * 300, "a\0b", "locked/out", "/proc/out", "/", ""),
        *("dangling", "dangling/out", "linked"),
    ],
)
def test_an_output_that_cannot_be_made_is_refused_at_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "texts.jsonl").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "here").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    if os.geteuid() == 0 and output.startswith("locked"):
        pytest.skip("root may write everywhere")
    target = output and Path(tmp_path, output)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CompressionError) as caught:
        compress(tiny_llama, RTN, target)
    assert caught.value.code == ("output_exists" if output == "/" else "output_not_writable")
    assert len(str(caught.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_mount_point_is_refused_at_once(tmp_path: Path) -> None:
    mounted = 'mount -t tmpfs none "$1" && exec "$0" -c "$2" "$1"'
    code = (
        "import sys, pathlib, compression.run.journal as j\n"
        "try: j.check_output(pathlib.Path(sys.argv[1]))\n"
        "except Exception as error: print(error.code, error)"
    )
    (tmp_path / "out").mkdir()
    command = ["unshare", "-rm", "sh", "-c", mounted, sys.executable, str(tmp_path / "out"), code]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not done.stdout and "Traceback" not in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.stdout.startswith("output_not_writable"), done
    assert "is a mount point" in done.stdout


@pytest.mark.parametrize("taken_by", ["link", "files"])
def test_an_output_that_is_taken_meanwhile_costs_no_layer(
    tiny_llama: Path, tmp_path: Path, taken_by: str
) -> None:
    out = tmp_path / "out"

    def take(event: Event) -> None:
        if isinstance(event, PhaseChanged) and event.phase == "verify":
            if taken_by == "link":
                out.symlink_to("nowhere")
            else:
                out.mkdir()
                (out / "file").touch()

    with pytest.raises(ResourceError) as caught:
        compress(tiny_llama, RTN, out, on_event=take)
    assert caught.value.code == "output_not_writable"
    out.rename(tmp_path / "aside")
    events: list[Event] = []
    compress(tiny_llama, RTN, out, on_event=events.append)
    assert [event.layer for event in events if isinstance(event, LayerReplayed)] == [0, 1]
    assert not (out / ".bitmill").exists()


def test_an_output_that_cannot_be_made_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    """The model is nowhere: whoever asked for it first would say so."""
    (tmp_path / "texts.jsonl").touch()
    with pytest.raises(PlanError) as caught:
        compress("someone/nothing", RTN, tmp_path / "texts.jsonl" / "out")
    assert (caught.value.code, caught.value.problems[0].pointer) == ("output_not_writable", "/output_dir")


def test_names_of_250_characters_are_copied(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / ("n" * 250)).write_text("a licence")
    compress(source, RTN, tmp_path / "out")
    assert (tmp_path / "out" / ("n" * 250)).read_text() == "a licence"
