"""Runs LLM Compressor's GPTQ on single layers. A script of its own: it runs under the peer's interpreter.

    python peer_gptq.py layers.safetensors solved.safetensors < args.json

layers: "<name>.weight" [out, in], "<name>.hessian" [in, in], "<name>.scale", "<name>.zero_point" and
"<name>.global_scale" where there is one. args: {name: fields of QuantizationArgs}. solved: the rounded
weights, "<name>" [out, in].
"""

from __future__ import annotations

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main(layers: str, solved: str) -> None:
    tensors = load_file(layers)
    results = {}
    for name, fields in json.load(sys.stdin).items():
        scale, global_scale = tensors[f"{name}.scale"], tensors.get(f"{name}.global_scale")
        zero_point = tensors.get(f"{name}.zero_point", torch.zeros_like(scale))
        rounded, _, fallback = quantize_weight(
            tensors[f"{name}.weight"][None],
            tensors[f"{name}.hessian"][None],
            scale[None],
            zero_point[None],
            global_scale,
            QuantizationArgs.model_validate(fields),
        )
        assert not fallback.any()
        results[name] = rounded[0].contiguous()
    save_file(results, solved)


if __name__ == "__main__":
    main(*sys.argv[1:])
