"""Make a random Llama of any size on disk, one layer in memory at a time: for memory measurements.

    python -m benchmarks.random_llama FOLDER --layers 24 [--hidden-size 2048] ...

Weights are normal with standard deviation 1/sqrt(fan in); the tokenizer is the test suite's, a token a byte.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from compression.checkpoint.writer import Shard, write_file, write_index, write_shard
from tests.support.models import tiny_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--kv-heads", type=int, default=4)
    options = parser.parse_args()
    make(
        options.folder,
        layers=options.layers,
        hidden=options.hidden_size,
        intermediate=options.intermediate_size,
        vocab=options.vocab_size,
        kv_heads=options.kv_heads,
    )


def make(folder: Path, *, layers: int, hidden: int, intermediate: int, vocab: int, kv_heads: int) -> Path:
    """Write config, tokenizer, a shard a layer and one for the rest, in bf16."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    head_dim = 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "torch_dtype": "bfloat16",
    }
    write_file(folder / "config.json", json.dumps(config, indent=2).encode())
    tiny_tokenizer().save_pretrained(folder)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).bfloat16()

    shards: list[Shard] = []
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        tensors = {
            "self_attn.q_proj.weight": matrix(hidden, hidden),
            "self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            "self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            "self_attn.o_proj.weight": matrix(hidden, hidden),
            "mlp.gate_proj.weight": matrix(intermediate, hidden),
            "mlp.up_proj.weight": matrix(intermediate, hidden),
            "mlp.down_proj.weight": matrix(hidden, intermediate),
            "input_layernorm.weight": ones,
            "post_attention_layernorm.weight": ones,
        }
        file = folder / f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        shards.append(write_shard(file, {prefix + name: tensor for name, tensor in tensors.items()}))
    rest = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(vocab, hidden),
    }
    shards.append(write_shard(folder / f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", rest))
    write_index(folder, shards)
    return folder


if __name__ == "__main__":
    main()
