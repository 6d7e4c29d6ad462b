"""Run by vLLM's interpreter: what checkpoints answer and how they like a passage.

    .venv-vllm/bin/python tests/conformance/vllm_answer.py < request.json

request: {"checkpoints": {name: path}, "conversation": [message, ...], "passage": text}

The last line of what it prints is JSON:

    {"amx": bool, "exact_int8": bool,
     "seen": {name: {"answer": text, "losses": [nats, ...]} or {"error": text}}}

A conversation ends with the first words of the model's answer; it may be empty. losses: the negative log
likelihood of each token of the passage but the first. error: why vLLM did not load or run the checkpoint.

vLLM chooses its CPU kernels by what the processor has, which matters to who compares numbers:

- W4A16 needs AVX-512. Without it, that one matrix product is done in torch here, on the weights as vLLM
  has read and repacked them. With AMX, vLLM would round activations to int8: that is turned off.
- int8 products saturate without VNNI where two neighbouring ones add up to more than 16 bits hold: then
  `exact_int8` is false.
- FP8_BLOCK and compressed experts need AMX (`amx`). With it, activations of FP8 and FP8_BLOCK are left alone,
  and those of 4-bit experts are rounded to int8.

Of FP8, q, k and v get one scale as they are put together, by an operation that the CPU build does not
have (scaled_fp8_quant): it is done in torch here. Everything else is vLLM's own.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # these must be set before the import
os.environ["VLLM_CPU_INT4_W4A8"] = "0"
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

SIGNATURE = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, "
    "Tensor? bias, int pack_factor, str isa_hint) -> ()"
)


def wna16(
    x: Tensor,
    packed: Tensor,
    output: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> None:
    """output [tokens, out] = x [tokens, in] times the 4-bit weight, plus bias.

    packed: int32 [out / 16, in * 2]; a row holds 16 outputs, for each input two words of eight codes.
    scales: [in / group, out]. zeros: int32 [in / group, out / 8], eight codes a word; None for 8.
    """
    blocks, inputs = packed.shape[0], packed.shape[1] // 2
    codes = unpack(packed.view(blocks, inputs, 2)).permute(1, 0, 2).reshape(inputs, blocks * 16)
    group = inputs // scales.shape[0]
    zero = 8 if zeros is None else unpack(zeros).repeat_interleave(group, 0)
    weight = (codes - zero).to(x.dtype) * scales.repeat_interleave(group, 0)
    product = x @ weight
    output.copy_(product if bias is None else product + bias)


def unpack(words: Tensor) -> Tensor:
    """int32 [..., n] as the eight 4-bit codes of each word, lowest first, [..., n * 8]."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2)


def scaled_fp8_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x in units of scale, as fp8, and the scale."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def exact_int8() -> bool:
    """Whether a product of int8 matrices with all entries 127 is what it should be."""
    weight, scales = torch.full((32, 64), 127, dtype=torch.int8), torch.ones(32, 1)
    handler = ops.create_onednn_scaled_mm(weight.t(), scales, torch.float32, True, False)  # keeps an address
    output = torch.empty(1, 32)
    ops.onednn_scaled_mm(handler, weight[:1].contiguous(), output, torch.ones(1, 1), None, None, None)
    return bool((output == 64 * 127 * 127).all())


def read(checkpoint: str, conversation: list[dict[str, str]], passage: str) -> dict[str, Any]:
    model = LLM(
        checkpoint,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=1,
        kv_cache_memory_bytes=2**26,
        gpu_memory_utilization=0.1,  # vLLM does not start unless this share of the host's memory is free
    )
    result: dict[str, Any] = {}
    if conversation:
        [reply] = model.chat(
            conversation,
            SamplingParams(temperature=0, max_tokens=16),
            add_generation_prompt=False,
            continue_final_message=True,
            use_tqdm=False,
        )
        result["answer"] = reply.outputs[0].text
    [scored] = model.generate(passage, SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False)
    # One dict a token, the first None: with 0, it holds the token that stands there and no other.
    result["losses"] = [-next(iter(token.values())).logprob for token in scored.prompt_logprobs[1:]]
    return result


def main() -> None:
    request = json.load(sys.stdin)
    torch.cpu._init_amx()  # Linux grants AMX to who asks, and the kernel of W4A16 does not
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(SIGNATURE)
        library.impl("cpu_gemm_wna16", wna16, "CPU")
    ops.scaled_fp8_quant = scaled_fp8_quant
    registry._run_in_subprocess = lambda function: function()  # or it imports vLLM anew for each architecture
    seen: dict[str, dict[str, Any]] = {}
    for name, checkpoint in request["checkpoints"].items():
        try:
            seen[name] = read(checkpoint, request["conversation"], request["passage"])
        except Exception as error:  # which of them may be is for the tests to say
            seen[name] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            cleanup_dist_env_and_memory()
    result = {"amx": torch.cpu._is_amx_tile_supported(), "exact_int8": exact_int8(), "seen": seen}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
