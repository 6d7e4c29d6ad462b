"""Perplexity of one checkpoint as Transformers loads it. The same code scores the original and every result.

    python benchmarks/perplexity.py CHECKPOINT TOKENS.safetensors

TOKENS holds `input_ids`, int64 [blocks, tokens]. The arithmetic is float32 for every checkpoint; activations
are quantized where its scheme says so. Prints one line of JSON. Nothing of Bitmill is imported.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def load(checkpoint: str) -> torch.nn.Module:
    """The model in float32: the differences are those of the checkpoints, on any processor."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    quantization = getattr(config, "quantization_config", {})
    groups = quantization.get("config_groups", {}).values()
    if any(not group["weights"]["symmetric"] for group in groups):
        # compressed-tensors 0.20 expects unpacked zero points, against its own format, unless it dequantizes
        # at once; then weights are rounded to the stored dtype, and activations are left as they are
        if any(group["input_activations"] for group in groups):
            raise SystemExit("asymmetric weights beside quantized activations cannot be scored")
        quantization["dequantize"] = True
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def negative_log_likelihoods(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Nats, float64 [blocks, tokens - 1]; everything in float32."""
    rows = []
    for block in blocks:
        logits = model(block[None], use_cache=False).logits[0, :-1]
        rows.append(torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").double())
    return torch.stack(rows)


@torch.inference_mode()
def main(checkpoint: str, tokens: str) -> None:
    losses = negative_log_likelihoods(load(checkpoint), load_file(tokens)["input_ids"])
    score = {
        "perplexity": math.exp(losses.mean()),
        "tokens": losses.numel(),
        "block_means": losses.mean(1).tolist(),
    }
    sys.stdout.write(json.dumps(score) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
