"""What independent code makes of a written checkpoint."""

from __future__ import annotations

import json
import re
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
    """Of a checkpoint, read as `logits` reads it, over blocks of one length."""
    model = _load(folder)
    losses = []
    with torch.no_grad():
        for batch in torch.stack([*blocks]).split(32):
            logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1).double()
            losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean().exp())


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
        return as_meant(folder)
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


def as_meant(folder: Path, dtype: torch.dtype = torch.float32, *, experts_round: bool = True) -> nn.Module:
    """What a checkpoint says, without its readers: weights are scale times code, and what linears and experts
    read is quantized by the library.

    experts_round: whether activations inside of experts are quantized. Keys and values are not.
    """
    dense = folder.with_name(folder.name + "-dense")
    shutil.rmtree(dense, ignore_errors=True)
    shutil.copytree(folder, dense, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((dense / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (dense / "config.json").write_text(json.dumps(config))
    stored = {
        key: tensor for shard in folder.glob("*.safetensors") for key, tensor in load_file(shard).items()
    }
    groups = list(quantization["config_groups"].values())
    weights = _dequantized(stored, groups)
    if config["model_type"] == "llama4_text":
        weights = _stacked(weights)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    model = load_model(dense, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            args = _activations(name, groups, quantization["ignore"])
            fixed = {kind: _of_linear(stored, name, f"input_{kind}") for kind in ("scale", "global_scale")}
            if args is not None:
                module.register_forward_pre_hook(
                    lambda _, inputs, args=args, fixed=fixed: (_quantized(inputs[0], args, **fixed),)
                )
        elif experts_round and hasattr(module, "num_experts") and hasattr(module, "gate_up_proj"):
            args = _activations(f"{name}.0.gate_proj", groups, quantization["ignore"])
            forward = _scaled_experts_forward if isinstance(module, Llama4TextExperts) else _experts_forward
            if args is not None:
                module.forward = partial(forward, module, args)
    return model


def _of_linear(stored: dict[str, Tensor], name: str, suffix: str) -> Tensor | None:
    """A tensor that belongs to a linear of a layer. Models that read images have other names on disk."""
    leaf = f"layers.{name.rpartition('layers.')[2]}.{suffix}"
    return next((tensor for key, tensor in stored.items() if key.endswith(f".{leaf}")), None)


def _activations(
    name: str, groups: Sequence[dict[str, Any]], ignore: Sequence[str]
) -> QuantizationArgs | None:
    """How the input of the linear of that name is quantized."""
    for group in groups:
        if _is_target(name, group) or ("Linear" in group["targets"] and name not in ignore):
            args = group["input_activations"]
            return None if args is None else QuantizationArgs.model_validate(args)
    return None


def _is_target(name: str, group: dict[str, Any]) -> bool:
    return any(
        re.match(target.removeprefix("re:"), name) if target.startswith("re:") else target == name
        for target in group["targets"]
    )


def _dequantized(stored: dict[str, Tensor], groups: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """float32 weights under their plain names; what is not compressed is converted only."""
    weights = {}
    for key, tensor in stored.items():
        name, _, suffix = key.rpartition(".")
        if suffix in ("weight", "weight_packed"):
            parts = {part: stored[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in stored}
            weights[f"{name}.weight"] = _weight(tensor, parts, _bits(name, groups))
        elif suffix not in (*_PARTS, "input_scale", "input_global_scale", "k_scale", "v_scale"):
            weights[key] = tensor.float()
    return weights


_PARTS = ("weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape")
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _bits(name: str, groups: Sequence[dict[str, Any]]) -> int:
    """Bits of a weight, of those that have codes."""
    named = [group for group in groups if _is_target(name, group)] or list(groups)
    bits: int = named[0]["weights"]["num_bits"]
    return bits


def _weight(codes: Tensor, parts: dict[str, Tensor], num_bits: int) -> Tensor:
    """The weight [out, in] that codes and scales stand for, in float32.

    uint8 codes hold two e2m1 numbers each, the first in the low nibble; uint8 scales are exponents of two
    over 127 (E8M0). int32 codes are unpacked by the library.
    """
    if "weight_shape" in parts:
        shape = torch.Size(parts["weight_shape"].tolist())
        codes = unpack_from_int32(codes, num_bits, shape)
    elif codes.dtype == torch.uint8:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
        codes = _E2M1[nibbles & 7] * torch.where(nibbles > 7, -1.0, 1.0)
    if "weight_scale" not in parts:
        return codes.float()
    scale = parts["weight_scale"]
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    scale = scale.reshape(-1, scale.shape[-1]) / parts.get("weight_global_scale", torch.ones(1))
    values = codes.float()
    if "weight_zero_point" in parts:
        zeros = unpack_from_int32(
            parts["weight_zero_point"], num_bits, torch.Size(scale.shape), packed_dim=0
        ).float()
        values = values - _spread(zeros, values)
    return values * _spread(scale, values)


def _spread(parts: Tensor, over: Tensor) -> Tensor:
    """What holds for blocks of rows and columns, for each number in them. The last blocks may be cut off:
    those of FP8_BLOCK have 128 rows."""
    rows, columns = over.shape
    height = 128 if 1 < parts.shape[0] < rows else -(-rows // parts.shape[0])
    width = -(-columns // parts.shape[1])
    return parts.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


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


def _quantized(
    x: Tensor, args: QuantizationArgs, scale: Tensor | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """By a scale for each token; the library takes the second of three dimensions for tokens.

    scale, global_scale: where calibration fixed them.
    """
    tokens = x.reshape(1, -1, x.shape[-1])
    if scale is None:
        scale, zero_point = compute_dynamic_scales_and_zp(tokens, args, nn.Identity(), global_scale)
    else:
        scale, zero_point = scale.to(x.dtype), None
    return fake_quantize(tokens, scale, zero_point, args, global_scale=global_scale).reshape(x.shape)


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
