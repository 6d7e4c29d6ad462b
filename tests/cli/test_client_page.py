"""The Python that the documents show of the client, run against a real server with a worker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Server

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("docs/client.md", "README.md")


def program(document: str, server: Server) -> str:
    """What a document shows of the client, for this server and its small model."""
    blocks = _BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    start = next(number for number, block in enumerate(blocks) if "api.client" in block)
    code = "\n".join(blocks[start:] if document == "docs/client.md" else [blocks[start]])
    for shown, here in (
        ("http://127.0.0.1:8080", server.welcome["url"]),
        ("/models/llama", str(server.model)),
        ("/models/texts.jsonl", str(server.texts)),
        ('samples": 128, "max_seq_length": 512', 'samples": 4, "max_seq_length": 64'),
    ):
        code = code.replace(shown, here)
    return code


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_shown_runs(
    document: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"key": json.loads(Path(server.welcome["credentials_file"]).read_text())["api_key"]}
    exec(compile(program(document, server), document, "exec"), names)
    if document == "docs/client.md":
        said = capsys.readouterr().out
        assert "\nsucceeded succeeded None\n" in said
        assert "\n1 unknown_scheme\n" in said
        assert "\njob_succeeded\n" in said
        assert (tmp_path / "llama-W4A16" / "config.json").exists()
