"""docs/settings.md lists the settings that there are, with their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def _rows() -> dict[str, str]:
    cells = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| `BITMILL_")]
    return {name.strip(" `"): default.strip() for name, default in cells}


def _shown(value: Any, data_dir: Path) -> set[str]:
    """How the page may write a default."""
    if value is None or value == ():
        return {"none", "made in `<data>/secret.key`", "from `<data>/credentials.json`"}
    text = str(value).replace(str(data_dir), "<data>")
    return {f"`{text}`"}


def test_every_setting_has_a_row() -> None:
    assert set(_rows()) == {f"BITMILL_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_the_default_is_the_code_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    settings = Settings()
    default = _rows()[f"BITMILL_{name.upper()}"]
    if name == "data_dir":
        assert settings.data_dir == Path(default.strip("`")).expanduser()
    elif name == "sweep_seconds":
        remote = Settings(broker_url="redis://localhost")
        assert default == f"`{settings.sweep_seconds:g}` on `memory://`, else `{remote.sweep_seconds:g}`"
    else:
        assert default in _shown(getattr(settings, name), settings.data_dir)
