"""serve's welcome, doctor, db upgrade, and how the command line starts."""

from __future__ import annotations

import json
import pkgutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import cli
import migrations
from api.database import make_engine
from tests.cli.bitmill import bitmill
from tests.cli.conftest import Server
from tests.support.postgres import PostgresServer, new_database

PROCESSES = ("cli.demo.answer", "cli.demo.convert")  # the demo runs these by themselves


def test_serve_says_where_it_is_and_shows_the_key_it_made(server: Server) -> None:
    credentials = Path(server.welcome["credentials_file"])
    stored = json.loads(credentials.read_text())
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    assert server.welcome["api_key"] == stored["api_key"]
    assert server.welcome["url"] == stored["url"]


def test_doctor_finds_a_served_folder_healthy(server: Server) -> None:
    result = server.bitmill("doctor", "--json", LOCAL_ROOTS=str(server.home / "root"))
    found = {check["name"]: check["status"] for check in result.json["checks"]}
    assert result.code == 0
    assert result.json["healthy"]
    wanted = {"python", "torch", "data folder", "disk", "database", "broker", "store", "local roots"}
    assert found.keys() == wanted
    assert {name for name, status in found.items() if status != "ok"} <= {
        "disk"
    }  # a warning where it is full


def test_doctor_names_what_is_broken(tmp_path: Path) -> None:
    result = bitmill(
        tmp_path,
        "doctor",
        "--json",
        BROKER_URL="redis://127.0.0.1:9/0",
        STORE_URL="ftp://nowhere",
        DATABASE_URL=f"sqlite:///{tmp_path}",
        LOCAL_ROOTS=str(tmp_path / "missing"),
    )
    broken = {check["name"] for check in result.json["checks"] if check["status"] == "failed"}
    assert result.code == 1
    assert broken == {"broker", "store", "database", "local roots"}
    assert all(check["hint"] for check in result.json["checks"] if check["name"] in broken)


def test_doctor_says_what_to_do_about_a_database_without_a_schema(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "doctor")
    assert result.code == 0  # an embedded server migrates by itself
    assert "bitmill db upgrade" in result.out


def test_db_upgrade_makes_the_schema_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        result = bitmill(tmp_path, "db", "upgrade", "--json")
        assert (result.code, result.json) == (0, {"revision": migrations.head()})
    file = tmp_path / ".local" / "share" / "bitmill" / "bitmill.db"
    engine = make_engine(f"sqlite:///{file}")
    assert migrations.current(engine) == migrations.head()
    engine.dispose()


def test_a_worker_does_not_begin_on_a_schema_that_is_not_its_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    migrations.upgrade(url, "0009")
    settings = {"DATABASE_URL": url, "BROKER_URL": "redis://127.0.0.1:1/0"}
    result = bitmill(tmp_path, "worker", "--json", **settings)
    assert (result.code, result.json["error"]["code"]) == (1, "schema_stale")
    settings["DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"
    result = bitmill(tmp_path, "worker", "--json", **settings)
    assert (result.code, result.json["error"]["code"]) == (1, "database_unavailable")


def test_a_schema_that_is_newer_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / ".local" / "share" / "bitmill" / "bitmill.db"
    migrations.upgrade(f"sqlite:///{file}")
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    for command in (["db", "upgrade"], ["serve", "--port", "0"]):
        result = bitmill(tmp_path, *command, "--json")
        assert (result.code, result.json["error"]["code"]) == (1, "schema_newer")
    (found,) = [
        each for each in bitmill(tmp_path, "doctor", "--json").json["checks"] if each["name"] == "database"
    ]
    assert found["status"] == "failed"
    assert "9999" in found["message"]


def test_db_upgrade_on_postgresql(tmp_path: Path, postgres: PostgresServer) -> None:
    with new_database(postgres, template="template1") as url:
        result = bitmill(tmp_path, "db", "upgrade", "--json", DATABASE_URL=url)
        assert (result.code, result.json) == (0, {"revision": migrations.head()})
        migrations.check(url)


def test_no_module_of_the_command_line_imports_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(cli.__path__, "cli.")]
    modules = [name for name in names if not name.endswith("__main__") and name not in PROCESSES]
    assert set(PROCESSES) < set(names)
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


def test_help_loads_neither_the_server_nor_the_client() -> None:
    code = (
        "import sys\nfrom cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'fastapi', 'sqlalchemy', 'celery', 'httpx', 'uvicorn'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exit codes" in answer.stdout
    assert answer.stderr.strip() == "[]"
