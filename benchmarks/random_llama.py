"""Make a random Llama or Mixtral of any size on disk, one layer in memory at a time: to measure memory.

    python -m benchmarks.random_llama FOLDER --layers 24 [--hidden-size 2048] ...

Weights are normal with standard deviation 1/sqrt(fan in); the tokenizer is the test suite's, a token a byte.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compression.checkpoint.writer import Shard, write_file, write_index, write_shard
from compression.machine.arithmetic import DTYPES
from tests.support.models import tiny_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; none unless given")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    make(
        options.folder,
        layers=options.layers,
        hidden=options.hidden_size,
        intermediate=options.intermediate_size,
        vocab=options.vocab_size,
        kv_heads=options.kv_heads,
        experts=options.experts,
        dtype=options.dtype,
    )


HEAD_DIM = 64


def make(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    kv_heads: int,
    experts: int = 0,
    dtype: str = "bfloat16",
    head_dim: int = HEAD_DIM,
) -> Path:
    """Write config, tokenizer, a shard a layer and one for the rest.

    experts: makes it a Mixtral with so many in each layer, of which each token goes to two.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    write_file(folder / "config.json", json.dumps(config, indent=2).encode())
    tiny_tokenizer().save_pretrained(folder)

    def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {f"{name}.weight": _random(shape, generator, DTYPES[dtype]) for name, shape in shapes.items()}

    shards: list[Shard] = []
    for index in range(layers):
        shapes = {
            f"model.layers.{index}.{name}": shape
            for name, shape in _layer(hidden, intermediate, kv_heads * head_dim, experts).items()
        }
        file = folder / f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        shards.append(write_shard(file, tensors(shapes)))
    rest = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    file = folder / f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors"
    shards.append(write_shard(file, tensors(rest)))
    write_index(folder, shards)
    return folder


def _layer(hidden: int, intermediate: int, kv: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Modules of one layer and the shapes of their weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    if not experts:
        return shapes | {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow}
    shapes["block_sparse_moe.gate"] = (experts, hidden)
    for number in range(experts):
        name = f"block_sparse_moe.experts.{number}"
        shapes |= {f"{name}.w1": wide, f"{name}.w3": wide, f"{name}.w2": narrow}
    return shapes


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).to(dtype)


if __name__ == "__main__":
    main()
