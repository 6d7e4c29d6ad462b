"""docker-compose.yml and deploy/, held to the Dockerfile and the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.settings import Settings
from tests.deploy.dockerfile import parse
from tests.deploy.names import commands, setting_variables

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("bitmill-")}
FILES = ["docker-compose.yml", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "deploy").iterdir()))]


def _environment(service: dict[str, Any]) -> dict[str, str]:
    lines = [
        line
        for file in service["env_file"]
        for line in (ROOT / file).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return dict(line.split("=", 1) for line in lines)


def test_the_three_parts_are_there() -> None:
    assert {"api", "worker", "valkey"} <= set(SERVICES)


def test_builds_name_existing_targets_and_the_image_they_make() -> None:
    stages = parse(ROOT / "Dockerfile")
    built = {service["image"]: service["build"]["target"] for service in OURS.values() if "build" in service}
    assert built == {"bitmill-api": "api", "bitmill-worker": "worker"}
    assert set(built.values()) <= set(stages)
    assert {service["image"] for service in OURS.values()} == set(built)


def test_commands_exist() -> None:
    for service in OURS.values():
        if "command" in service:
            program, *words = service["command"]
            assert program == "bitmill"
            assert " ".join(words) in commands()


@pytest.mark.parametrize("file", FILES)
def test_every_variable_is_a_setting(file: str) -> None:
    assert set(re.findall(r"\bBITMILL_\w+", (ROOT / file).read_text())) <= setting_variables()


def test_the_settings_are_valid_and_use_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment(SERVICES["api"]).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert not settings.embedded
    assert f"redis://valkey:{6379}/" in settings.broker_url
    assert "valkey" in SERVICES


def test_api_and_worker_share_settings_and_data() -> None:
    environments = [_environment(service) for service in OURS.values()]
    assert all(environment == environments[0] for environment in environments)
    data = environments[0]["BITMILL_DATA_DIR"]
    assert all(f"data:{data}" in service["volumes"] for service in OURS.values())
    assert "data" in COMPOSE["volumes"]


def test_models_are_mounted_where_the_roots_say() -> None:
    roots = _environment(SERVICES["api"])["BITMILL_LOCAL_ROOTS"]
    mounts = [SERVICES[name]["volumes"][1] for name in ("api", "worker")]
    assert mounts[0] == mounts[1]
    assert mounts[0].endswith(f":{roots}:ro")


def test_the_published_port_is_the_one_that_the_server_listens_on() -> None:
    (published,) = SERVICES["api"]["ports"]
    host, _, container = published.rsplit(":", 2)
    assert host == "127.0.0.1"
    assert int(container) == Settings.model_fields["port"].default


def test_nothing_starts_on_a_schema_that_is_not_there() -> None:
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_overrides_change_services_that_exist() -> None:
    for path in (ROOT / "deploy").glob("compose.*.yml"):
        assert set(yaml.safe_load(path.read_text())["services"]) <= set(SERVICES)
