"""POST /v1/batches: 1,000 items over 10 local models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from benchmarks.console import say
from benchmarks.load.machine import Api
from tests.compression.fake_checkpoints import fake_llama

_MODELS = 10
_SCHEMES = (
    "W4A16", "W4A16_ASYM", "W8A16", "W4A8", "W4AFP8", "W8A8", "FP8_DYNAMIC", "MXFP4", "MXFP8", "NVFP4A16",
)  # fmt: skip
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "10": [{"scheme": "W4A16", "calibration": {"seed": n}} for n in range(100)],
    "100": [{"scheme": scheme, "calibration": {"seed": n}} for scheme in _SCHEMES for n in range(10)],
    "1,000": [{"scheme": "W4A16", "calibration": {"num_calibration_samples": n + 1}} for n in range(100)],
}
"""What is decided alike is planned once. By the number of plans of 1,000 jobs: what a model's 100 jobs differ
in."""


def measure(api: Api, what: str, config: Mapping[str, Any]) -> None:
    """On Llamas of that configuration, which have headers and no weights."""
    models = [fake_llama(api.root / f"{config['num_hidden_layers']}-{n}", config) for n in range(_MODELS)]
    dataset = api.root / "texts.jsonl"
    dataset.write_text('{"text": "Of a dataset, planning looks for the file."}\n')
    for plans, variants in VARIANTS.items():
        jobs = [
            {"model": str(each), "dataset": str(dataset), **variant}
            for each in models
            for variant in variants
        ]
        began = time.perf_counter()
        answer = httpx.post(
            f"http://127.0.0.1:{api.port}/v1/batches",
            json={"jobs": jobs},
            headers={"Authorization": f"Bearer {api.key}"},
            timeout=60,
        )
        seconds = time.perf_counter() - began
        assert answer.json()["counts"]["accepted"] == len(jobs), answer.text
        say(f"A batch of {len(jobs):,} on {_MODELS} models of {what}, {plans} plans: {seconds:.2f} s")
