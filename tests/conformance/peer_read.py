"""Reads compressed checkpoints by an older compressed-tensors and Transformers. A script of its own: it runs
under the peer's interpreter.

    python peer_read.py < jobs.json

jobs: [{"checkpoint", "output", "tokens": [[...], ...]}, ...]. output: a safetensors file with each module's
weight as the library dequantizes it, "<module>" [out, in], and "logits" [batch, seq, vocab] where
Transformers loads the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def run(job: dict[str, Any]) -> None:
    folder = Path(job["checkpoint"])
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(written).config_groups.values()
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    results = {
        name.removesuffix(".weight_scale"): dequantized(tensors, name.removesuffix("weight_scale"), scheme)
        for name in tensors
        if name.endswith(".weight_scale")
    }
    if scheme.weights.symmetric:  # of a compressed model Transformers expects zero points that are not packed
        results["logits"] = logits(folder, torch.tensor(job["tokens"]), scheme)
    save_file(results, job["output"])


def dequantized(tensors: dict[str, Tensor], prefix: str, scheme: QuantizationScheme) -> Tensor:
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: Tensor = compressor.decompress(state, scheme)["weight"]
    return weight.contiguous()


@torch.no_grad()
def logits(folder: Path, tokens: Tensor, scheme: QuantizationScheme) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if scheme.weights.scale_dtype is not None:
        model.hf_quantizer.compressor.decompress_model(model)
        torch.nn.Module.float(model)  # compressed-tensors makes bfloat16 of these, whatever the model is in
    result: Tensor = model(input_ids=tokens).logits
    return result.float()


if __name__ == "__main__":
    for each in json.load(sys.stdin):
        run(each)
