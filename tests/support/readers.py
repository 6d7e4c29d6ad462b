"""What independent code makes of a written checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from tests.support.models import load_model


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Of a checkpoint in Transformers and compressed-tensors, activations quantized as they serve them.

    tokens: [batch, seq]. Returns float32 [batch, seq, vocab].
    """
    model = _load(folder)
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens).logits
    return result.float()


def perplexity(folder: Path, blocks: Sequence[Tensor]) -> float:
    """Of a checkpoint, read as `logits` reads it; block by block."""
    model = _load(folder)
    losses = []
    with torch.no_grad():
        for block in blocks:
            logits = model(input_ids=block[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:]))
    return float(torch.stack(losses).mean().exp())


def losses(folder: Path, text: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Negative log likelihood of each token of the text but the first, in nats, read the same way and
    computed in `dtype`."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = _load(folder).to(dtype)(input_ids=tokens).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")


def _load(folder: Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    quantization = getattr(config, "quantization_config", {})
    groups = list(quantization.get("config_groups", {}).values())
    has_experts = any(
        "experts." in name for shard in folder.glob("*.safetensors") for name in load_file(shard)
    )
    packed = all(group["format"] == "pack-quantized" for group in groups)
    if groups and has_experts and not (packed and config.model_type != "llama4_text"):
        return _load_dequantized(folder, groups[0], quantization["ignore"])
    if any(not group["weights"]["symmetric"] for group in groups):
        # compressed-tensors 0.20 expects unpacked zero points of a compressed model, against its own format
        quantization["dequantize"] = True
    model = load_model(folder, config=config, dtype=torch.float32)
    if any(group["weights"].get("scale_dtype") for group in groups):
        model.hf_quantizer.compressor.decompress_model(model)
        nn.Module.float(model)  # compressed-tensors makes bfloat16 of these, whatever the model is in
    for name, module in model.named_modules():
        if name.endswith(".fc1"):  # OPT flattens the batch there; the library takes each number for a token
            module.register_forward_pre_hook(lambda _module, args: (args[0][None],))
    return model


def _load_dequantized(folder: Path, group: dict[str, Any], ignore: Sequence[str]) -> nn.Module:
    """Transformers 5.23 reads experts packed only, and Llama 4's stacked only: others are dequantized here,
    scale times code, and what linears and experts read is quantized by the library."""
    dense = folder.with_name(folder.name + "-dense")
    shutil.copytree(folder, dense, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    stored = {
        key: tensor for shard in folder.glob("*.safetensors") for key, tensor in load_file(shard).items()
    }
    weights = _dequantized(stored, group["weights"]["num_bits"])
    if config["model_type"] == "llama4_text":
        weights = _stacked(weights)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    model = load_model(dense, dtype=torch.float32)
    if group["input_activations"] is None:
        return model
    args = QuantizationArgs.model_validate(group["input_activations"])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ignore:
            module.register_forward_pre_hook(lambda _module, inputs: (_quantized(inputs[0], args),))
        elif hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
            forward = _scaled_experts_forward if isinstance(module, Llama4TextExperts) else _experts_forward
            module.forward = partial(forward, module, args)
    return model


def _dequantized(stored: dict[str, Tensor], num_bits: int) -> dict[str, Tensor]:
    """float32 weights under their plain names; what is not compressed is converted only."""
    weights = {}
    for key, tensor in stored.items():
        name, _, suffix = key.rpartition(".")
        if suffix in ("weight_scale", "weight_shape"):
            continue
        codes = tensor.float()
        if suffix == "weight_packed":
            shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
            codes, suffix = unpack_from_int32(tensor, num_bits, shape).float(), "weight"
        scale = stored.get(f"{name}.weight_scale") if suffix == "weight" else None
        if scale is not None:
            codes = codes * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        weights[f"{name}.{suffix}"] = codes
    return weights


def _stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama 4's experts as it stores them: [experts, in, gate and up], [experts, inner, out]."""
    stacked = {key: tensor for key, tensor in weights.items() if ".experts." not in key}
    blocks: dict[str, dict[str, Tensor]] = {}
    for key in weights.keys() - stacked.keys():
        name, _, linear = key.partition(".experts.")
        blocks.setdefault(f"{name}.experts", {})[linear] = weights[key].T
    for name, linears in blocks.items():
        experts = range(len(linears) // 3)
        gate, up, down = (
            torch.stack([linears[f"{number}.{leaf}_proj.weight"] for number in experts])
            for leaf in ("gate", "up", "down")
        )
        stacked[f"{name}.gate_up_proj"] = torch.cat((gate, up), dim=-1)
        stacked[f"{name}.down_proj"] = down
    return stacked


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


def _scaled_experts_forward(experts: nn.Module, args: QuantizationArgs, x: Tensor) -> Tensor:
    """Every expert has tokens of its own in x [experts * tokens, hidden], times 0 where it was not chosen."""
    gate, up = (_quantized(x, args).unflatten(0, (experts.num_experts, -1)) @ experts.gate_up_proj).chunk(
        2, -1
    )
    inner = _quantized(experts.act_fn(gate) * up, args)
    return (inner @ experts.down_proj).flatten(0, 1)
