"""Runs LLM Compressor on local checkpoints. A script of its own: it runs under the peer's interpreter.

    python peer_rtn.py < jobs.json

jobs: [{"source", "output", "method": "rtn" | "gptq", "scheme", "group_size": int | null, "tokens",
        "ignore", "kv_cache_scheme"}, ...]

tokens: rows of token ids to calibrate on, null where nothing is learned from data.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts


def run(job: dict[str, Any]) -> None:
    scheme = preset_name_to_scheme(job["scheme"], ["Linear"])
    if job["group_size"] is not None:
        scheme.weights.group_size = job["group_size"]
    modifier = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[job["method"]]
    cache = job["kv_cache_scheme"] and QuantizationArgs.model_validate(job["kv_cache_scheme"])
    recipe = modifier(config_groups={"group_0": scheme}, ignore=job["ignore"], kv_cache_scheme=cache)
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
    for module in model.modules():
        if isinstance(module, Llama4TextExperts):  # LLM Compressor looks for the config of the whole Llama 4
            module.config = SimpleNamespace(text_config=model.config)
    data: dict[str, Any] = {}
    if rows := job["tokens"]:
        masks = [[1] * len(row) for row in rows]
        dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
        data = {"dataset": dataset, "num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
    oneshot(model=model, recipe=recipe, output_dir=job["output"], **data)


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        run(each)
