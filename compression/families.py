"""The decoders that the engine knows.

One table, FAMILIES: for each model type the linears of a layer, which of them read the same input, the other
tensors, and what Transformers assumes where config.json is silent. Shapes are written in the model's sizes,
by name ("q" = heads x head_dim; decoder.py has them all), so a new family is one entry here. Nothing is
imported from Transformers; a test compares this module with its modeling code.
"""

from __future__ import annotations

from dataclasses import replace

from compression.structure import ExpertsSpec, Family, Groups, GroupSpec, LinearSpec, Sparse, Vision


def _attention(norm: str = "input_layernorm", *, qkv_bias: str = "", o_bias: str = "") -> Groups:
    names = (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv"))
    qkv = tuple(LinearSpec(f"self_attn.{name}", size, "hidden", qkv_bias) for name, size in names)
    return (
        GroupSpec(qkv, norm),
        _alone("self_attn.o_proj", "hidden", "q", o_bias, producer="self_attn.v_proj"),
    )


def _gated_mlp(norm: str = "post_attention_layernorm", *, bias: str = "", name: str = "mlp") -> Groups:
    leaves = ("gate_proj", "up_proj")
    gate_up = tuple(LinearSpec(f"{name}.{leaf}", "inner", "hidden", bias) for leaf in leaves)
    return (
        GroupSpec(gate_up, norm),
        _alone(f"{name}.down_proj", "hidden", "inner", bias, producer=f"{name}.up_proj"),
    )


def _alone(name: str, out: str, inp: str, bias: str = "", norm: str = "", producer: str = "") -> GroupSpec:
    return GroupSpec((LinearSpec(name, out, inp, bias),), norm, producer)


def _parallel(attention: Groups, mlp: Groups) -> Groups:
    """Attention and MLP read one norm, side by side: their first groups are one."""
    first = GroupSpec(attention[0].linears + mlp[0].linears, attention[0].norm)
    return (first, *attention[1:], *mlp[1:])


_FUSED_MLP: Groups = (
    _alone("mlp.gate_up_proj", "gate_up", "hidden", norm="post_attention_layernorm"),
    _alone("mlp.down_proj", "hidden", "inner", producer="mlp.gate_up_proj"),
)


def _norms(*names: str, shape: tuple[str, ...] = ("hidden",)) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": shape for name in names}


def _layer_norm(name: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": ("hidden",), f"{name}.bias": ("hidden",)}


_PRE_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = _PRE_NORMS | _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", shape=("head",))
_ALL_BIASED = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}


def _router(name: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": ("experts", "hidden")}


def _shared_expert(name: str, gate: str = "", gate_out: str = "one") -> Groups:
    """An expert that sees every token, and a gate that reads the same, where there is one."""
    gate_up = tuple(
        LinearSpec(f"{name}.{leaf}", "shared_inner", "hidden") for leaf in ("gate_proj", "up_proj")
    )
    gates = (LinearSpec(gate, gate_out, "hidden", gate=True),) if gate else ()
    return (GroupSpec(gate_up + gates), _alone(f"{name}.down_proj", "hidden", "shared_inner"))


_LATENT_ATTENTION: Groups = (
    GroupSpec(
        (
            LinearSpec("self_attn.q_a_proj", "q_lora", "hidden", "attention_bias"),
            LinearSpec("self_attn.kv_a_proj_with_mqa", "kv_a", "hidden", "attention_bias"),
        ),
        "input_layernorm",
    ),
    _alone("self_attn.q_b_proj", "q", "q_lora", norm="self_attn.q_a_layernorm"),
    _alone("self_attn.kv_b_proj", "kv_b", "kv_lora"),  # reads a view of its norm's output
    _alone("self_attn.o_proj", "hidden", "attended", "attention_bias"),
)
_LATENT_SIZES = {
    "q": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "qk_rope_head_dim")),
    "q_lora": (("q_lora_rank",),),
    "kv_lora": (("kv_lora_rank",),),
    "kv_a": (("kv_lora_rank",), ("qk_rope_head_dim",)),
    "kv_b": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "v_head_dim")),
    "attended": (("num_attention_heads", "v_head_dim"),),
    "head": (("qk_rope_head_dim",),),
}
_LATENT_NORMS = (
    _PRE_NORMS
    | _norms("self_attn.q_a_layernorm", shape=("q_lora",))
    | _norms("self_attn.kv_a_layernorm", shape=("kv_lora",))
)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _attention(**_ALL_BIASED) + _gated_mlp(bias="mlp_bias"), _PRE_NORMS),
    "mistral": Family(
        "MistralForCausalLM", _attention() + _gated_mlp(), _PRE_NORMS, defaults={"num_key_value_heads": 8}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _attention(qkv_bias="always") + _gated_mlp(),
        _PRE_NORMS,
        defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(),
        _PRE_NORMS | _QK_NORMS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(),
        _PRE_NORMS,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp("pre_feedforward_layernorm"),
        _FOUR_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
        eager=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp("pre_feedforward_layernorm"),
        _FOUR_NORMS | _QK_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (
            _alone("self_attn.qkv_proj", "qkv", "hidden", norm="input_layernorm"),
            _alone("self_attn.o_proj", "hidden", "q", producer="self_attn.qkv_proj"),
            *_FUSED_MLP,
        ),
        _PRE_NORMS,
    ),
    "granite": Family(
        "GraniteForCausalLM", _attention(**_ALL_BIASED) + _gated_mlp(bias="mlp_bias"), _PRE_NORMS
    ),
    "glm": Family(
        "GlmForCausalLM",
        _attention(qkv_bias="attention_bias") + _FUSED_MLP,
        _PRE_NORMS,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        _attention(qkv_bias="attention_bias") + _FUSED_MLP,
        _PRE_NORMS | _norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _attention("", **_ALL_BIASED) + _gated_mlp(""),
        _norms("post_attention_layernorm", "post_feedforward_layernorm")
        | _norms("self_attn.q_norm", shape=("q",))
        | _norms("self_attn.k_norm", shape=("kv",)),
    ),
    "cohere": Family(
        "CohereForCausalLM",
        _parallel(_attention(**_ALL_BIASED), _gated_mlp()),
        _norms("input_layernorm"),
        optional={
            "use_qk_norm": _norms("self_attn.q_norm", shape=("heads", "head"))
            | _norms("self_attn.k_norm", shape=("kv_heads", "head"))
        },
        defaults={"tie_word_embeddings": True},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        _parallel(_attention(**_ALL_BIASED), _gated_mlp()),
        _norms("input_layernorm"),
        defaults={"tie_word_embeddings": True},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _attention(),
        _PRE_NORMS,
        sparse=Sparse(
            (
                *_attention(),
                ExpertsSpec("block_sparse_moe.experts", "block_sparse_moe.gate", ("w1", "w3"), "w2"),
            ),
            _PRE_NORMS | _router("block_sparse_moe.gate"),
        ),
        sizes={"experts": (("num_local_experts",),), "expert_inner": (("intermediate_size",),)},
        aliases={"num_experts": "num_local_experts"},
        defaults={"num_key_value_heads": 8, "num_local_experts": 8},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(),
        _PRE_NORMS | _QK_NORMS,
        sparse=Sparse(
            (*_attention(**_ALL_BIASED), ExpertsSpec("mlp.experts", "mlp.gate")),
            _PRE_NORMS | _QK_NORMS | _router("mlp.gate"),
            dense=("mlp_only_layers", "decoder_sparse_step"),
        ),
        sizes={"experts": (("num_experts",),), "expert_inner": (("moe_intermediate_size",),)},
        aliases={"num_local_experts": "num_experts"},
        defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _attention(qkv_bias="qkv_bias") + _gated_mlp(),
        _PRE_NORMS,
        sparse=Sparse(
            (
                *_attention(qkv_bias="qkv_bias"),
                *_shared_expert("mlp.shared_expert", "mlp.shared_expert_gate"),
                ExpertsSpec("mlp.experts", "mlp.gate"),
            ),
            _PRE_NORMS | _router("mlp.gate"),
            dense=("mlp_only_layers", "decoder_sparse_step"),
        ),
        sizes={
            "experts": (("num_experts",),),
            "expert_inner": (("moe_intermediate_size",),),
            "shared_inner": (("shared_expert_intermediate_size",),),
        },
        aliases={"num_local_experts": "num_experts"},
        defaults={
            "num_key_value_heads": 16,
            "num_experts": 60,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _attention(**_ALL_BIASED),
        _PRE_NORMS,
        sparse=Sparse(
            (*_attention(**_ALL_BIASED), ExpertsSpec("mlp.experts", "mlp.gate")),
            _PRE_NORMS
            | _norms("self_attn.q_norm", shape=("hidden",))
            | _norms("self_attn.k_norm", shape=("kv",))
            | _router("mlp.gate"),
        ),
        sizes={"experts": (("num_experts",),), "expert_inner": (("intermediate_size",),)},
        aliases={"num_local_experts": "num_experts"},
        defaults={"num_experts": 64},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        _LATENT_ATTENTION + _gated_mlp(),
        _LATENT_NORMS,
        sparse=Sparse(
            (
                *_LATENT_ATTENTION,
                ExpertsSpec("mlp.experts", "mlp.gate"),
                *_shared_expert("mlp.shared_experts"),
            ),
            _LATENT_NORMS | _router("mlp.gate") | {"mlp.gate.e_score_correction_bias": ("experts",)},
            dense=("first_k_dense_replace",),
        ),
        sizes=_LATENT_SIZES
        | {
            "experts": (("n_routed_experts",),),
            "expert_inner": (("moe_intermediate_size",),),
            "shared_inner": (("moe_intermediate_size", "n_shared_experts"),),
        },
        aliases={"num_local_experts": "n_routed_experts"},
        defaults={
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(name="feed_forward"),
        _PRE_NORMS,
        sparse=Sparse(
            (
                *_attention(**_ALL_BIASED),
                ExpertsSpec(
                    "feed_forward.experts",
                    "feed_forward.router",
                    stacks=("gate_up_proj", "down_proj"),
                    scales_inputs=True,
                ),
                *_shared_expert("feed_forward.shared_expert", "feed_forward.router", "experts"),
            ),
            _PRE_NORMS,
            dense=("moe_layers", "decoder_sparse_step"),
        ),
        sizes={
            "experts": (("num_local_experts",),),
            "expert_inner": (("intermediate_size",),),
            "shared_inner": (("intermediate_size",),),
        },
        aliases={"interleave_moe_layer_step": "decoder_sparse_step"},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 16,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
        },
        intermediate_key="intermediate_size_mlp",
    ),
    "opt": Family(
        "OPTForCausalLM",
        (
            GroupSpec(
                tuple(LinearSpec(f"self_attn.{n}_proj", "hidden", "hidden", "enable_bias") for n in "qkv"),
                "self_attn_layer_norm",
            ),
            _alone("self_attn.out_proj", "hidden", "hidden", "enable_bias", producer="self_attn.v_proj"),
            _alone("fc1", "inner", "hidden", "enable_bias", "final_layer_norm"),
            _alone("fc2", "hidden", "inner", "enable_bias"),
        ),
        _layer_norm("self_attn_layer_norm") | _layer_norm("final_layer_norm"),
        defaults={"enable_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        fixed={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
        layers_prefix="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        outside={"model.decoder.embed_positions.weight": ("positions + 2", "hidden")}
        | _layer_norm("model.decoder.final_layer_norm"),
        intermediate_key="ffn_dim",
    ),
}
"""By `model_type`."""

_QWEN_VISION = Vision(
    "qwen2_5_vl_text",
    modules=("model.visual.",),
    renamed={
        "visual.": "model.visual.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.layers.": "model.language_model.layers.",
        "model.norm.": "model.language_model.norm.",
    },
)
_LLAVA_VISION = Vision(
    "llama",
    modules=("model.vision_tower.", "model.multi_modal_projector."),
    renamed={
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "model.vision_tower.vision_model.": "model.vision_tower.",
        "vision_tower.": "model.vision_tower.",
    },
)


def _reads_images(architecture: str, text: Family, vision: Vision, **defaults: int) -> Family:
    """A family whose decoder lies beside a vision tower in Transformers; defaults are those of its config."""
    return replace(
        text,
        architecture=architecture,
        vision=vision,
        defaults={**text.defaults, **defaults},
        layers_prefix="model.language_model.layers.",
        embedding="model.language_model.embed_tokens.weight",
        outside=_norms("model.language_model.norm"),
    )


FAMILIES |= {
    "qwen2_5_vl": _reads_images(
        "Qwen2_5_VLForConditionalGeneration", FAMILIES["qwen2"], _QWEN_VISION, num_key_value_heads=8
    ),
    "llava": _reads_images(
        "LlavaForConditionalGeneration",
        FAMILIES["llama"],
        _LLAVA_VISION,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
}
