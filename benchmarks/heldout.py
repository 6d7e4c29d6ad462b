"""The text that perplexity is measured on: fixed before the first run, in no calibration set.

The Lee background corpus, 300 news reports in English, one a line, as the wheel of gensim 4.4.0 ships it
among its test data. Nothing of gensim is imported; it is only where the text comes from.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from cli.demo.wheels import fetch_wheel

REQUIREMENT = "gensim==4.4.0"
MEMBER = "gensim/test/test_data/lee_background.cor"
SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"


def heldout_text(cache: Path) -> str:
    """The text, downloaded into `cache` with this interpreter's pip if it is not there yet."""
    wheel = fetch_wheel(REQUIREMENT, "gensim-4.4.0-*.whl", cache)
    with zipfile.ZipFile(wheel) as archive:
        raw = archive.read(MEMBER)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{MEMBER} has sha256 {digest}, not {SHA256}")
    return raw.decode()
