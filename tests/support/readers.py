"""What independent code makes of a written checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def perplexity(folder: Path, blocks: Sequence[Tensor]) -> float:
    """Of a checkpoint in Transformers and compressed-tensors, activations quantized as they serve them."""
    model = _load(folder)
    losses = []
    with torch.no_grad():
        for block in blocks:
            logits = model(input_ids=block[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:]))
    return float(torch.stack(losses).mean().exp())


def losses(folder: Path, text: str) -> Tensor:
    """Negative log likelihood of each token of the text but the first, in nats, read the same way."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = _load(folder)(input_ids=tokens).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")


def _load(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", {})
    groups = list(quantization.get("config_groups", {}).values())
    has_experts = any(
        "experts." in name for shard in folder.glob("*.safetensors") for name in load_file(shard)
    )
    if has_experts and any(group["format"] != "pack-quantized" for group in groups):
        return _load_dequantized(folder, groups[0], quantization["ignore"])
    if any(not group["weights"]["symmetric"] for group in groups):
        # compressed-tensors 0.20 expects unpacked zero points of a compressed model, against its own format
        quantization["dequantize"] = True
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    if any(group["weights"].get("scale_dtype") for group in groups):
        model.hf_quantizer.compressor.decompress_model(model)
        nn.Module.float(model)  # compressed-tensors makes bfloat16 of these, whatever the model is in
    for name, module in model.named_modules():
        if name.endswith(".fc1"):  # OPT flattens the batch there; the library takes each number for a token
            module.register_forward_pre_hook(lambda _module, args: (args[0][None],))
    return model


def _load_dequantized(folder: Path, group: dict[str, Any], ignore: Sequence[str]) -> nn.Module:
    """Transformers 5.23 reads experts packed only: others are dequantized here, scale times code, and what
    linears and experts read is quantized by the library."""
    dense = folder.with_name(folder.name + "-dense")
    shutil.copytree(folder, dense, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    stored = {
        key: tensor for shard in folder.glob("*.safetensors") for key, tensor in load_file(shard).items()
    }
    scales = {key.removesuffix("_scale"): stored.pop(key) for key in list(stored) if key.endswith("_scale")}
    weights = {key: tensor.float() * scales.get(key, 1.0) for key, tensor in stored.items()}
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    args = QuantizationArgs.model_validate(group["input_activations"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ignore:
            module.register_forward_pre_hook(lambda _module, inputs: (_quantized(inputs[0], args),))
        elif hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
            module.forward = partial(_experts_forward, module, args)
    return model


def _quantized(x: Tensor, args: QuantizationArgs) -> Tensor:
    """A scale for each token; the library takes the second of three dimensions for tokens."""
    tokens = x.reshape(1, -1, x.shape[-1])
    scale, zero_point = compute_dynamic_scales_and_zp(tokens, args, nn.Identity())
    return fake_quantize(tokens, scale, zero_point, args).reshape(x.shape)


def _experts_forward(
    experts: nn.Module, args: QuantizationArgs, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Every expert computes every token of x [tokens, hidden]; those it was not chosen for weigh nothing."""
    result = torch.zeros_like(x)
    for number in range(experts.num_experts):
        weights = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
        gate, up = (_quantized(x, args) @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        inner = _quantized(experts.act_fn(gate) * up, args)
        result += weights * (inner @ experts.down_proj[number].T)
    return result
