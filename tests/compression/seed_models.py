"""The three models whose memory the seed's guide works out, as files that are all header.

Names and shapes are those of meta-llama/Meta-Llama-3-8B-Instruct, deepseek-ai/DeepSeek-R1-0528 (in BF16) and
Qwen/Qwen2.5-VL-7B-Instruct.
"""

from __future__ import annotations

from pathlib import Path

from tests.compression.fake_checkpoints import LLAMA_3_8B, fake_llama, write_config, write_fake

Shapes = dict[str, tuple[int, ...]]


def llama_3_8b(folder: Path) -> Path:
    return fake_llama(folder, LLAMA_3_8B)


def deepseek_r1(folder: Path) -> Path:
    """61 layers, the first three dense, and one for multi-token prediction."""
    hidden, heads, vocab = 7168, 128, 129_280
    attention: Shapes = {
        "self_attn.q_a_proj": (1536, hidden),
        "self_attn.q_a_layernorm": (1536,),
        "self_attn.q_b_proj": (heads * (128 + 64), 1536),
        "self_attn.kv_a_proj_with_mqa": (512 + 64, hidden),
        "self_attn.kv_a_layernorm": (512,),
        "self_attn.kv_b_proj": (heads * (128 + 128), 512),
        "self_attn.o_proj": (hidden, heads * 128),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    moe = {"mlp.gate": (256, hidden)} | _mlp("mlp.shared_experts", hidden, 2048)
    for expert in range(256):
        moe |= _mlp(f"mlp.experts.{expert}", hidden, 2048)
    prediction: Shapes = {
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "embed_tokens": (vocab, hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (vocab, hidden),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(62):
        layer = attention | (_mlp("mlp", hidden, 18_432) if index < 3 else moe)
        shapes |= _named(f"model.layers.{index}.", layer | (prediction if index == 61 else {}))
        if index >= 3:
            shapes[f"model.layers.{index}.mlp.gate.e_score_correction_bias"] = (256,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": 61,
        "vocab_size": vocab,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
    }
    return _written(folder, config, shapes)


def qwen_2_5_vl_7b(folder: Path) -> Path:
    """28 text layers with biases of q, k and v; a vision tower of 32 layers and its merger."""
    hidden, wide, vision, vocab = 3584, 18_944, 1280, 152_064
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (4 * 128, hidden),
        "self_attn.v_proj": (4 * 128, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    } | _mlp("mlp", hidden, wide)
    block = {
        "norm1": (vision,),
        "norm2": (vision,),
        "attn.qkv": (3 * vision, vision),
        "attn.proj": (vision, vision),
    } | _mlp("mlp", vision, 3420)
    shapes: Shapes = {"visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14)}
    for index in range(32):
        shapes |= _with_biases(_named(f"visual.blocks.{index}.", block))
    merger: Shapes = {
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.2.weight": (hidden, 5120),
    }
    shapes |= {"visual.merger.ln_q.weight": (vision,)} | _with_biases(merger)
    shapes["model.embed_tokens.weight"] = (vocab, hidden)
    for index in range(28):
        named = _named(f"model.layers.{index}.", layer)
        qkv = {
            name: shape
            for name, shape in named.items()
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        }
        shapes |= named | _with_biases(qkv)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128_000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {"depth": 32, "hidden_size": vision, "intermediate_size": 3420, "num_heads": 16},
    }
    return _written(folder, config, shapes)


def _written(folder: Path, config: dict[str, object], shapes: Shapes) -> Path:
    folder.mkdir()
    write_config(folder, config)
    write_fake(folder / "model.safetensors", shapes)
    return folder


def _mlp(name: str, hidden: int, inner: int) -> Shapes:
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {f"{name}.{linear}": shape for linear, shape in sizes.items()}


def _named(prefix: str, modules: Shapes) -> Shapes:
    return {f"{prefix}{name}.weight": shape for name, shape in modules.items()}


def _with_biases(weights: Shapes) -> Shapes:
    """Every matrix with a bias beside it."""
    biases = {
        name.removesuffix("weight") + "bias": shape[:1] for name, shape in weights.items() if len(shape) == 2
    }
    return weights | biases
