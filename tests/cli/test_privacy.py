"""Other users of the machine read nothing of what a server keeps."""

from __future__ import annotations

import stat
from pathlib import Path

from tests.cli.bitmill import bitmill
from tests.cli.conftest import Server


def exposed(folder: Path) -> set[str]:
    """What others than the owner can access, with its mode."""
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {f"{path} {mode:04o}" for path, mode in modes.items() if mode & 0o077}


def test_everything_in_the_data_folder_is_private(server: Server) -> None:
    assert server.submit(*server.calibrated, "--wait").code == 0
    data = server.home / "data"
    kept = {path.name for path in data.rglob("*")}
    assert {"bitmill.db", "bitmill.db-wal", "credentials.json", "secret.key", "manifest.json"} <= kept
    assert exposed(data) == set()


def test_doctor_and_db_upgrade_tell_of_a_folder_that_others_can_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "notes.txt").write_text("mine")
    data.chmod(0o755)
    checks = bitmill(tmp_path, "doctor", "--json", DATA_DIR=str(data)).json["checks"]
    (found,) = [check for check in checks if check["name"] == "data folder"]
    assert found["status"] == "warning"
    assert "'notes.txt'" in found["message"]
    upgraded = bitmill(tmp_path, "db", "upgrade", "--json", DATA_DIR=str(data))
    assert upgraded.code == 0
    assert "chmod 700" in upgraded.err
    (data / "notes.txt").unlink()
    assert bitmill(tmp_path, "db", "upgrade", "--json", DATA_DIR=str(data)).err == ""
    assert exposed(data) == set()
