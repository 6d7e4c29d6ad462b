"""Run by vLLM's interpreter: what a checkpoint answers and how it likes a passage, in a line of JSON.

    .venv-vllm/bin/python tests/conformance/vllm_answer.py CHECKPOINT CONVERSATION.json PASSAGE

The conversation ends with the first words of the model's answer. The passage's score is its mean negative log
likelihood in nats, without the first token.

vLLM's CPU kernels for 4-bit weights are compiled for AVX-512 only. On a processor without it, that one matrix
product is done in plain torch here, on the weights as vLLM has read and repacked them; everything else is
vLLM's own. `native_kernels` says which it was. On processors without VNNI instructions, vLLM's 8-bit products
saturate where two neighbouring ones add up to more than 16 bits hold: then `exact_int8` is false.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; both must be set before the import
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
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
    """output [tokens, out] = x [tokens, in] times the symmetric 4-bit weight, plus bias.

    packed: int32 [out / 16, in * 2]; a row holds 16 outputs, for each input two words of eight codes + 8.
    scales: [in / group, out].
    """
    assert zeros is None
    blocks, inputs = packed.shape[0], packed.shape[1] // 2
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (packed.view(blocks, inputs, 2, 1) >> shifts & 15) - 8
    codes = codes.view(blocks, inputs, 16).permute(1, 0, 2).reshape(inputs, blocks * 16)
    weight = codes.to(x.dtype) * scales.repeat_interleave(inputs // scales.shape[0], 0)
    product = x @ weight
    output.copy_(product if bias is None else product + bias)


def exact_int8() -> bool:
    """Whether a product of int8 matrices with all entries 127 is what it should be."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    handler = ops.create_onednn_scaled_mm(weight.t(), torch.ones(32, 1), torch.float32, True, False)
    output = torch.empty(1, 32)
    ops.onednn_scaled_mm(handler, weight[:1].contiguous(), output, torch.ones(1, 1), None, None, None)
    return bool((output == 64 * 127 * 127).all())


def main(checkpoint: str, conversation: str, passage: str) -> None:
    current_platform.import_kernels()
    native = hasattr(torch.ops._C, "cpu_gemm_wna16")
    if not native:
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(SIGNATURE)
        library.impl("cpu_gemm_wna16", wna16, "CPU")
    model = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=512)
    [reply] = model.chat(
        json.loads(conversation),
        SamplingParams(temperature=0, max_tokens=16),
        add_generation_prompt=False,
        continue_final_message=True,
        use_tqdm=False,
    )
    [read] = model.generate(passage, SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False)
    # One dict a token, the first None: with 0, it holds the token that stands there and no other.
    logprobs = [next(iter(token.values())).logprob for token in read.prompt_logprobs[1:]]
    result = {
        "answer": reply.outputs[0].text,
        "passage_loss": -sum(logprobs) / len(logprobs),
        "native_kernels": native,
        "exact_int8": exact_int8(),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
