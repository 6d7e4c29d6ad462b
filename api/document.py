"""`python -m api.document > docs/openapi.json`: the OpenAPI document of this version."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from api.main import create_app
from api.settings import Settings


def document() -> dict[str, Any]:
    """The document. It is the same whatever the settings of this machine are."""
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder), secret_key=SecretStr("none")))
        app.state.context.database.close()
    return app.openapi()


def openapi_text() -> str:
    """The document, as it is committed."""
    return json.dumps(document(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(openapi_text())
