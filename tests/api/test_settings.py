"""Settings come from BITMILL_ variables, with defaults inside the data folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from api.settings import Settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BITMILL_{name.upper()}", raising=False)


def test_defaults_lie_in_the_data_folder(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/bitmill.db"
    assert settings.store_url == f"file://{tmp_path}/artifacts"
    assert settings.credentials_file == tmp_path / "credentials.json"
    assert (settings.broker_url, settings.embedded, settings.sweep_seconds) == ("memory://", True, 2)
    assert (settings.host, settings.port, settings.local_roots) == ("127.0.0.1", 8080, ())
    assert (settings.lease_seconds, settings.heartbeat_seconds, settings.max_attempts) == (90, 15, 3)


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("BITMILL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BITMILL_LOCAL_ROOTS", f"{tmp_path / 'link'}:/srv/models")
    monkeypatch.setenv("BITMILL_BROKER_URL", "redis://localhost:6379/0")
    settings = Settings()
    assert settings.local_roots == (tmp_path / "real", Path("/srv/models"))
    assert (settings.embedded, settings.sweep_seconds) == (False, 30)
    assert settings.database_url == f"sqlite:///{tmp_path}/data/bitmill.db"


def test_home_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().data_dir == tmp_path / ".local/share/bitmill"


def test_a_lease_must_outlive_its_heartbeats() -> None:
    with pytest.raises(ValidationError, match="twice heartbeat_seconds"):
        Settings(lease_seconds=20, heartbeat_seconds=15)


def test_secrets_are_not_printed() -> None:
    settings = Settings.model_validate({"api_key": "bitmill_abc", "secret_key": "hush"})
    assert "bitmill_abc" not in repr(settings)
    assert "hush" not in repr(settings)


def test_prefixes_in_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITMILL_S3_PREFIXES", "s3://texts, s3://more/data/")
    assert Settings().s3_prefixes == ("s3://texts", "s3://more/data")
    for wrong in ("texts", "s3://", "/texts", "s3://texts/../more"):
        monkeypatch.setenv("BITMILL_S3_PREFIXES", wrong)
        with pytest.raises(ValidationError, match="s3://bucket"):
            Settings()
