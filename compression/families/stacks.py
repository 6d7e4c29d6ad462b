"""Experts that lie stacked on disk, under the names that they have one by one.

    experts.gate_up_proj [experts, in, 2 x out]   ─▶   experts.0.gate_proj.weight [out, in]
                                                       experts.0.up_proj.weight
                                                       experts.1.gate_proj.weight ...

All of a checkpoint's experts are written so, compressed or not: vLLM reads stacks or single experts, but not
both in one checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.tensors import StackedWeight, StoredTensor, TensorInfo
from compression.families.decoder import Decoder


def unstacked(checkpoint: Checkpoint, decoder: Decoder) -> Checkpoint:
    """The checkpoint with each expert's linears in place of their stacks, which have the decoder's shapes."""
    sparse = decoder.family.sparse
    if sparse is None or not sparse.experts.stacks:
        return checkpoint
    tensors: dict[str, StoredTensor] = dict(checkpoint.tensors)
    for index in filter(decoder.is_sparse, range(decoder.num_layers)):
        prefix = f"{decoder.layers_prefix}{index}."
        for name, linears in sparse.experts.stacked().items():
            stack = tensors.pop(prefix + name)
            assert isinstance(stack, TensorInfo)
            for expert in range(decoder.sizes["experts"]):
                begin = 0
                for linear in linears:
                    key = f"{prefix}{sparse.experts.name}.{expert}.{linear.name}.weight"
                    out, _ = decoder.shape(linear)
                    tensors[key] = StackedWeight(key, stack, expert, begin, out)
                    begin += out
    return replace(checkpoint, tensors=tensors)
