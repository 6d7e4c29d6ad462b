"""`bitmill project` and `bitmill key`, on a database without a server."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.testclient import TestClient

import migrations
from api.main import create_app
from api.settings import Settings
from cli.exits import Exit
from tests.cli.bitmill import Result, bitmill


def test_projects_and_keys(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    migrations.upgrade(settings.database_url)

    def run(*arguments: str) -> Result:
        return bitmill(tmp_path, *arguments, DATA_DIR=str(settings.data_dir))

    made = run("project", "create", "search", "--json")
    assert made.code == Exit.OK, made.err
    again = run("project", "create", "search", "--json")
    assert (again.code, again.json["error"]["code"]) == (Exit.REFUSED, "project_exists")

    limits = ("--max-queued", "5", "--max-running", "none", "--requests-per-minute", "60")
    changed = run("project", "set", "search", *limits, "--json").json
    assert changed["limits"]["max_queued"] == 5
    assert changed["limits"]["max_running"] is None
    run("project", "set", "search", "--max-queued", "none", "--max-body-bytes", "2000")
    bad = run("project", "set", "search", "--max-queued", "-1", "--json")
    assert (bad.code, bad.json["error"]["code"]) == (Exit.USAGE, "bad_option")
    assert "max_queued" in bad.json["error"]["message"]
    prefixes = (
        "--s3-prefix",
        "s3://texts",
        "--output-prefix",
        "s3://models/a",
        "--output-prefix",
        "s3://models/b/",
    )
    changed = run("project", "set", "search", *prefixes, "--json").json
    assert (changed["s3_prefixes"], changed["output_prefixes"]) == (
        ["s3://texts"],
        ["s3://models/a", "s3://models/b"],
    )
    changed = run("project", "set", "search", "--s3-prefix", "none", "--json").json
    assert (changed["s3_prefixes"], changed["output_prefixes"]) == ([], ["s3://models/a", "s3://models/b"])
    bad = run("project", "set", "search", "--output-prefix", "/models", "--json")
    assert (bad.code, bad.json["error"]["code"]) == (Exit.USAGE, "bad_option")
    table = run("project", "list").out
    assert "0 of any" in table
    assert "2000" in table
    assert "s3://models/a" in table

    reader = run(
        "key", "create", "--project", "search", "--scope", "read", "--scope", "submit", "--json"
    ).json
    with TestClient(create_app(settings)) as http:

        def statuses(key: str) -> list[int]:
            headers = {"Authorization": f"Bearer {key}"}
            return [http.get(path, headers=headers).status_code for path in ("/v1/jobs", "/v1/keys")]

        assert statuses(made.json["key"]["key"]) == [200, 200]
        assert statuses(reader["key"]) == [200, 403]
        assert run("key", "revoke", made.json["key"]["id"]).code == Exit.OK  # the last one, here
        assert statuses(made.json["key"]["key"]) == [401, 401]
        assert statuses(reader["key"]) == [200, 403]
    unknown = run("key", "revoke", "key_x", "--json")
    assert (unknown.code, unknown.json["error"]["code"]) == (Exit.REFUSED, "key_not_found")
    listed = run("key", "list", "--project", "search", "--json").json["keys"]
    assert [key["id"] for key in listed] == [reader["id"], made.json["key"]["id"]]
    assert [key["revoked_at"] is None for key in listed] == [True, False]
    assert "key" not in listed[0]
    assert len(run("key", "list", "--project", "search", "--limit", "1", "--json").json["keys"]) == 1
    table = run("key", "list", "--project", "search").out
    assert re.search(rf"{reader['id']} +read, submit +good +\d", table)
    assert re.search(rf"{made.json['key']['id']} +admin +revoked +\d", table)
    stranger = run("key", "list", "--project", "ads", "--json")
    assert (stranger.code, stranger.json["error"]["code"]) == (Exit.REFUSED, "project_not_found")
    nobody = run("key", "create", "--project", "ads", "--scope", "read", "--json")
    assert (nobody.code, nobody.json["error"]["code"]) == (Exit.REFUSED, "project_not_found")


def test_without_a_schema_it_says_what_to_do(tmp_path: Path) -> None:
    result = bitmill(tmp_path, "project", "list", "--json")
    assert (result.code, result.json["error"]["code"]) == (Exit.FAILED, "database_failed")
    assert "bitmill db upgrade" in result.json["error"]["hint"]
