"""Scratch folders never outlive their worker for longer than it takes the next one to start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from worker.scratch import Scratch

HOLDER = """
import sys, time
from pathlib import Path
from worker.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]), "other")
(scratch.folder / "left").write_text("behind")
print("ready", flush=True)
time.sleep(60)
"""


def test_an_attempt_folder_is_private_and_removed_after_an_error(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch", "me")
    seen: list[Path] = []

    def work() -> None:
        with scratch.attempt("job", 3) as folder:
            seen.append(folder)
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "shard").write_bytes(b"x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert not seen[0].exists()
    scratch.close()
    assert not scratch.folder.exists()


def test_what_cannot_be_removed_hides_no_reason(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "scratch", "me")

    def fail_after_it_is_gone() -> None:
        with scratch.attempt("job", 1):
            shutil.rmtree(scratch.folder)
            raise RuntimeError("boom")

    with capture_logs() as records:
        with pytest.raises(RuntimeError, match="boom"):
            fail_after_it_is_gone()
        scratch.close()
    assert [record["event"] for record in records] == ["scratch_not_removed"] * 2


def test_a_killed_worker_s_folder_goes_and_a_living_one_s_stays(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        Scratch(tmp_path, "first").close()
        assert (tmp_path / "other" / "left").read_text() == "behind"
    finally:
        other.kill()
        other.communicate()
    Scratch(tmp_path, "second").close()
    assert not (tmp_path / "other").exists()
