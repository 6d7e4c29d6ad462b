"""All configuration, read once. Nothing else in Bitmill reads the environment, but for the variables of the
Hub (compression/hub/environment.py), of S3 (compression/s3/client.py) and of OpenTelemetry's SDK."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from compression.s3.client import S3Ref

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def check_s3_prefix(prefix: str) -> str:
    """The prefix without a slash at its end; ValueError if it is neither a bucket nor a folder of one."""
    short = prefix.rstrip("/")
    if S3Ref.parse(f"{short}/key") is None:
        raise ValueError(f"{prefix!r} is not s3://bucket or s3://bucket/folder")
    return short


class Settings(BaseSettings):
    """Settings of the service; each is the environment variable of its name with the prefix `BITMILL_`.

    data_dir: holds the defaults of the URLs and scratch_dir, credentials.json and secret.key.
    broker_url: `memory://` is the embedded mode; otherwise a redis:// URL of Valkey or Redis.
    local_roots: folders that models and datasets may lie in, separated by the path separator (`:`).
    store_url: `file://` and a folder, or `s3://bucket/folder`, where finished files are kept.
    download_url_seconds: how long an address in S3 is good that a download is sent to.
    s3_prefixes: `s3://bucket` or `s3://bucket/folder` that models and datasets may lie in, separated by
        commas; for projects without their own.
    lease_seconds, heartbeat_seconds: a worker renews a lease every heartbeat; a lease that ran out is reaped.
    sweep_seconds: how often workers look for lost leases and unclaimed jobs (2 embedded, else 30).
    max_attempts: counted attempts (crashes, lost leases) after which a job fails.
    max_queued, max_running, requests_per_minute: limits of projects without their own; none unless set.
    scratch_dir: where engines write; on the store's file system finished files become links, not copies.
    engine_memory_bytes: resident memory past which an engine is ended; no limit unless set.
    resume_days: how long a job that ended keeps its finished layers for a retry.
    webhook_allowed_hosts: hosts, separated by commas, that webhooks may reach by plain http and at addresses
        that are not public; all other webhooks are https to public addresses.
    webhook_delivery_days: how long the log of deliveries is kept.
    worker_metrics_port: where a `bitmill worker` shows its metrics, on `host`; nowhere unless set.
    otlp_endpoint: the http(s):// address of a collector that gets spans; none are made unless set.
    secret_key: keys the HMAC of stored API keys; made once in <data>/secret.key unless set here.
    url, api_key: which server the client talks to, and as whom; by default those of <data>/credentials.json.
    """

    model_config = SettingsConfigDict(env_prefix="BITMILL_", frozen=True)

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "bitmill")
    database_url: str = ""
    broker_url: str = "memory://"
    store_url: str = ""
    local_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    s3_prefixes: Annotated[tuple[str, ...], NoDecode] = ()
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    device: str = "auto"
    lease_seconds: float = Field(default=90, gt=0)
    heartbeat_seconds: float = Field(default=15, gt=0)
    sweep_seconds: float = Field(default=0, ge=0)
    max_attempts: int = Field(default=3, ge=1)
    scratch_dir: Path = Path()
    engine_memory_bytes: int | None = Field(default=None, ge=1)
    resume_days: float = Field(default=7, ge=0)
    download_url_seconds: int = Field(default=900, ge=1, le=604_800)
    activation_budget_bytes: int = Field(default=4 << 30, ge=1)
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    max_queued: int | None = Field(default=None, ge=0)
    max_running: int | None = Field(default=None, ge=0)
    requests_per_minute: int | None = Field(default=None, ge=1)
    webhook_allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    webhook_delivery_days: float = Field(default=30, gt=0)
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    worker_metrics_port: int | None = Field(default=None, ge=1, le=65535)
    otlp_endpoint: str | None = Field(default=None, pattern="^https?://")
    secret_key: SecretStr | None = None
    url: str | None = None
    api_key: SecretStr | None = None

    @field_validator("local_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @field_validator("local_roots")
    @classmethod
    def _absolute_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(Path(os.path.realpath(root.expanduser())) for root in roots)

    @field_validator("s3_prefixes", "webhook_allowed_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("s3_prefixes")
    @classmethod
    def _good_prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_s3_prefix(prefix) for prefix in prefixes)

    @field_validator("webhook_allowed_hosts")
    @classmethod
    def _good_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not _is_host(host):
                raise ValueError(
                    f"{host!r} is not a host: give a name or an address, without port or brackets"
                )
        return tuple(host.lower() for host in hosts)

    @model_validator(mode="before")
    @classmethod
    def _defaults_in_data_dir(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = values.get("data_dir") or cls.model_fields["data_dir"].get_default(call_default_factory=True)
        data = Path(os.path.abspath(Path(given).expanduser()))
        embedded = str(values.get("broker_url", "memory://")).startswith("memory://")
        return {
            **values,
            "data_dir": data,
            "database_url": values.get("database_url") or f"sqlite:///{data / 'bitmill.db'}",
            "store_url": values.get("store_url") or f"file://{data / 'artifacts'}",
            "scratch_dir": values.get("scratch_dir") or data / "scratch",
            "sweep_seconds": values.get("sweep_seconds") or (2 if embedded else 30),
        }

    @model_validator(mode="after")
    def _lease_outlives_heartbeats(self) -> Self:
        if self.lease_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds")
        return self

    @property
    def embedded(self) -> bool:
        """Whether API, worker and broker live in one process."""
        return self.broker_url.startswith("memory://")

    @property
    def credentials_file(self) -> Path:
        """Where the first API key is written: {"url", "api_key"}, readable by its owner only."""
        return self.data_dir / "credentials.json"


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return _HOST_NAME.fullmatch(text) is not None
    return True


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings, read from the environment at the first call."""
    return Settings()
