"""Checkpoints that are all header: the data is a hole in a sparse file, so that any size costs nothing.

Headers are put together here by hand, not with the code under test.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}

Shapes = Mapping[str, tuple[int, ...]]

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}


def header_bytes(header: Any) -> bytes:
    """Length and JSON text; `header` may be anything, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def write_raw(path: Path, header: Any, data: int | bytes = 0) -> Path:
    """A file of that header, followed by `data`: bytes, or a number of zeros that take no room."""
    start = header_bytes(header)
    path.write_bytes(start + (data if isinstance(data, bytes) else b""))
    if isinstance(data, int):
        with path.open("r+b") as file:
            file.truncate(len(start) + data)
    return path


def entries(shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> tuple[dict[str, Any], int]:
    """The header's entries, one after the other, and the bytes of data."""
    header, position = {}, 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "BF16")
        size = BYTES[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return header, position


def write_fake(path: Path, shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> Path:
    """A well-formed safetensors file of zeros."""
    header, size = entries(shapes, dtypes)
    return write_raw(path, {"__metadata__": {"format": "pt"}, **header}, size)


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama without biases."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_config(folder: Path, config: Mapping[str, Any], **changes: Any) -> None:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**base, **config, **changes}))


def fake_llama(
    folder: Path,
    config: Mapping[str, Any] = TINY,
    *,
    shards: int = 1,
    shapes: Shapes | None = None,
    dtypes: Mapping[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A Llama of headers. `shapes` replaces its tensors, `changes` go into config.json only."""
    folder.mkdir(exist_ok=True)
    write_config(folder, config, **changes)
    tensors = dict(shapes if shapes is not None else llama_shapes(config))
    if shards == 1:
        write_fake(folder / "model.safetensors", tensors, dtypes)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_fake(folder / file, {name: tensors[name] for name in part}, dtypes)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
