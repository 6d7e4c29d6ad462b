"""The peer's run: LLM Compressor, GPTQ W4A16, on tokens that were made beforehand.

    .venv-peer/bin/python benchmarks/peer_gptq.py MODEL TOKENS.safetensors OUTPUT [--observer imatrix_mse]

TOKENS holds `input_ids`, int64 [samples, tokens]. Everything that is not named here is the peer's default.
--float32 loads the model in float32: many times faster on a processor without bfloat16 arithmetic.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file


def run(
    model: Path, tokens: Path, output: Path, *, group_size: int, observer: str | None, float32: bool
) -> None:
    """Compresses `model` and saves it to `output`."""
    blocks = load_file(tokens)["input_ids"]
    dataset = Dataset.from_dict(
        {"input_ids": blocks.tolist(), "attention_mask": [[1] * blocks.shape[1]] * blocks.shape[0]}
    )
    chosen = {} if observer is None else {"observer": observer}
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size, **chosen
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=str(model),
        precision="float32" if float32 else "auto",
        dataset=dataset,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=blocks.shape[1],
        num_calibration_samples=blocks.shape[0],
        output_dir=str(output),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", help="the peer's default observer unless given")
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    run(
        options.model,
        options.tokens,
        options.output,
        group_size=options.group_size,
        observer=options.observer,
        float32=options.float32,
    )


if __name__ == "__main__":
    main()
