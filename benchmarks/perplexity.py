"""Perplexity of one checkpoint as Transformers loads it. The same code scores the original and every result.

    python benchmarks/perplexity.py CHECKPOINT TOKENS.safetensors

TOKENS holds `input_ids`, int64 [blocks, tokens]. The arithmetic is float32 for every checkpoint. Prints one
line of JSON. Nothing of Bitmill is imported.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def negative_log_likelihoods(model: torch.nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Nats, float64 [blocks, tokens - 1]; everything in float32."""
    rows = []
    for block in blocks:
        logits = model(block[None], use_cache=False).logits[0, :-1]
        rows.append(torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").double())
    return torch.stack(rows)


@torch.inference_mode()
def main(checkpoint: str, tokens: str) -> None:
    # float32 for all: the differences are those of the weights, and a CPU without bfloat16 is not in the way
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    ).eval()
    blocks = load_file(tokens)["input_ids"]
    losses = negative_log_likelihoods(model, blocks)
    score = {
        "perplexity": math.exp(losses.mean()),
        "tokens": losses.numel(),
        "block_means": losses.mean(1).tolist(),
    }
    sys.stdout.write(json.dumps(score) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
