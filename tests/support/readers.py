"""What independent code makes of a written checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def perplexity(folder: Path, blocks: Sequence[Tensor]) -> float:
    """Of a checkpoint in Transformers and compressed-tensors, activations quantized as they serve them."""
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", {})
    if any(not group["weights"]["symmetric"] for group in quantization.get("config_groups", {}).values()):
        # compressed-tensors 0.20 expects unpacked zero points of a compressed model, against its own format
        quantization["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.endswith(".fc1"):  # OPT flattens the batch there; the library takes each number for a token
            module.register_forward_pre_hook(lambda _module, args: (args[0][None],))
    losses = []
    with torch.no_grad():
        for block in blocks:
            logits = model(input_ids=block[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:]))
    return float(torch.stack(losses).mean().exp())
