"""The peer's run: LLM Compressor with a recipe file, on tokens that were made beforehand.

    .venv-peer/bin/python benchmarks/peer.py MODEL TOKENS.safetensors RECIPE.yaml OUTPUT [--float32]

TOKENS holds `input_ids`, int64 [samples, tokens]. What the recipe does not say is the peer's default.
--float32 loads the model in float32: many times faster on a processor without bfloat16 arithmetic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file


def run(model: Path, tokens: Path, recipe: Path, output: Path, *, float32: bool) -> None:
    """Compresses `model` and saves it to `output`."""
    blocks = load_file(tokens)["input_ids"]
    dataset = Dataset.from_dict(
        {"input_ids": blocks.tolist(), "attention_mask": [[1] * blocks.shape[1]] * blocks.shape[0]}
    )
    oneshot(
        model=str(model),
        precision="float32" if float32 else "auto",
        dataset=dataset,
        recipe=str(recipe),
        max_seq_length=blocks.shape[1],
        num_calibration_samples=blocks.shape[0],
        output_dir=str(output),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    run(options.model, options.tokens, options.recipe, options.output, float32=options.float32)


if __name__ == "__main__":
    main()
