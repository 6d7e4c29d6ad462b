"""The decoders that the engine knows.

One table, FAMILIES: for each model type the linears of a layer, which of them read the same input, the other
tensors, and what Transformers assumes where config.json is silent. Shapes are written in the model's sizes,
by name ("q" = heads x head_dim; decoder.py has them all), so a new family is one entry here. Nothing is
imported from Transformers; a test compares this module with its modeling code.
"""

from __future__ import annotations

from dataclasses import replace

from compression.families.layer_parts import (
    ALL_BIASED,
    FOUR_NORMS,
    FUSED_MLP,
    LATENT_ATTENTION,
    LATENT_NORMS,
    LATENT_SIZES,
    PRE_NORMS,
    QK_NORMS,
    alone,
    attention,
    gated_mlp,
    layer_norm,
    norms,
    parallel,
    router,
    shared_expert,
)
from compression.families.structure import ExpertsSpec, Family, GroupSpec, LinearSpec, Sparse, Vision

TIED_AND_PADDED = {"tie_word_embeddings": True, "pad_token_id": 0}
QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

DECODERS: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(bias="mlp_bias"),
        PRE_NORMS,
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        attention() + gated_mlp(),
        PRE_NORMS,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        attention(qkv_bias="always") + gated_mlp(),
        PRE_NORMS,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768} | QWEN_WINDOW,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(),
        PRE_NORMS | QK_NORMS,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768}
        | QWEN_WINDOW,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(),
        PRE_NORMS,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192}
        | TIED_AND_PADDED,
        norm_offset=1,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        attention(**ALL_BIASED) + gated_mlp("pre_feedforward_layernorm"),
        FOUR_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192}
        | {"sliding_window": 4096}
        | TIED_AND_PADDED,
        norm_offset=1,
        eager=True,
        activation_key="hidden_activation",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        attention(**ALL_BIASED) + gated_mlp("pre_feedforward_layernorm"),
        FOUR_NORMS | QK_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072}
        | {"sliding_window": 4096}
        | TIED_AND_PADDED,
        norm_offset=1,
        activation_key="hidden_activation",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (
            alone("self_attn.qkv_proj", "qkv", "hidden", norm="input_layernorm"),
            alone("self_attn.o_proj", "hidden", "q", producer="self_attn.qkv_proj"),
            *FUSED_MLP,
        ),
        PRE_NORMS,
        defaults={"max_position_embeddings": 4096, "pad_token_id": 32_000}
        | {"original_max_position_embeddings": 4096},
        rope_types=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},  # in its first releases
    ),
    "granite": Family(
        "GraniteForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(bias="mlp_bias"),
        PRE_NORMS,
        defaults={"max_position_embeddings": 2048},
    ),
    "glm": Family(
        "GlmForCausalLM",
        attention(qkv_bias="attention_bias") + FUSED_MLP,
        PRE_NORMS,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
        | {"partial_rotary_factor": 0.5}
        | {"max_position_embeddings": 131_072, "pad_token_id": 151_329},
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        attention(qkv_bias="attention_bias") + FUSED_MLP,
        PRE_NORMS | norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}
        | {"partial_rotary_factor": 0.5}
        | {"max_position_embeddings": 131_072, "pad_token_id": 151_329},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        attention("", **ALL_BIASED) + gated_mlp(""),
        norms("post_attention_layernorm", "post_feedforward_layernorm")
        | norms("self_attn.q_norm", shape=("q",))
        | norms("self_attn.k_norm", shape=("kv",)),
        defaults={"max_position_embeddings": 2048, "pad_token_id": 1},
    ),
    "cohere": Family(
        "CohereForCausalLM",
        parallel(attention(**ALL_BIASED), gated_mlp()),
        norms("input_layernorm"),
        optional={
            "use_qk_norm": norms("self_attn.q_norm", shape=("heads", "head"))
            | norms("self_attn.k_norm", shape=("kv_heads", "head"))
        },
        defaults={"max_position_embeddings": 8192} | TIED_AND_PADDED,
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        parallel(attention(**ALL_BIASED), gated_mlp()),
        norms("input_layernorm"),
        defaults={"max_position_embeddings": 8192, "sliding_window": 4096} | TIED_AND_PADDED,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        attention(),
        PRE_NORMS,
        sparse=Sparse(
            (
                *attention(),
                ExpertsSpec("block_sparse_moe.experts", "block_sparse_moe.gate", ("w1", "w3"), "w2"),
            ),
            PRE_NORMS | router("block_sparse_moe.gate"),
        ),
        sizes={"experts": (("num_local_experts",),), "expert_inner": (("intermediate_size",),)},
        aliases={"num_experts": "num_local_experts"},
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "max_position_embeddings": 131_072},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(),
        PRE_NORMS | QK_NORMS,
        sparse=Sparse(
            (*attention(**ALL_BIASED), ExpertsSpec("mlp.experts", "mlp.gate")),
            PRE_NORMS | QK_NORMS | router("mlp.gate"),
            dense=("mlp_only_layers", "decoder_sparse_step"),
        ),
        sizes={"experts": (("num_experts",),), "expert_inner": (("moe_intermediate_size",),)},
        aliases={"num_local_experts": "num_experts"},
        defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768}
        | {"max_position_embeddings": 32_768}
        | QWEN_WINDOW,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        attention(qkv_bias="qkv_bias") + gated_mlp(),
        PRE_NORMS,
        sparse=Sparse(
            (
                *attention(qkv_bias="qkv_bias"),
                *shared_expert("mlp.shared_expert", "mlp.shared_expert_gate"),
                ExpertsSpec("mlp.experts", "mlp.gate"),
            ),
            PRE_NORMS | router("mlp.gate"),
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
            "max_position_embeddings": 32_768,
        }
        | QWEN_WINDOW,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        attention(**ALL_BIASED),
        PRE_NORMS,
        sparse=Sparse(
            (*attention(**ALL_BIASED), ExpertsSpec("mlp.experts", "mlp.gate")),
            PRE_NORMS
            | norms("self_attn.q_norm", shape=("hidden",))
            | norms("self_attn.k_norm", shape=("kv",))
            | router("mlp.gate"),
        ),
        sizes={"experts": (("num_experts",),), "expert_inner": (("intermediate_size",),)},
        aliases={"num_local_experts": "num_experts"},
        defaults={"num_experts": 64, "max_position_embeddings": 4096, "pad_token_id": 1},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        LATENT_ATTENTION + gated_mlp(),
        LATENT_NORMS,
        sparse=Sparse(
            (
                *LATENT_ATTENTION,
                ExpertsSpec("mlp.experts", "mlp.gate"),
                *shared_expert("mlp.shared_experts"),
            ),
            LATENT_NORMS | router("mlp.gate") | {"mlp.gate.e_score_correction_bias": ("experts",)},
            dense=("first_k_dense_replace",),
        ),
        sizes=LATENT_SIZES
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
            "max_position_embeddings": 4096,
        },
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        attention(**ALL_BIASED) + gated_mlp(name="feed_forward"),
        PRE_NORMS,
        sparse=Sparse(
            (
                *attention(**ALL_BIASED),
                ExpertsSpec(
                    "feed_forward.experts",
                    "feed_forward.router",
                    stacks=("gate_up_proj", "down_proj"),
                    scales_inputs=True,
                ),
                *shared_expert("feed_forward.shared_expert", "feed_forward.router", "experts"),
            ),
            PRE_NORMS,
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
            "max_position_embeddings": 131_072,
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
            alone("self_attn.out_proj", "hidden", "q", "enable_bias", producer="self_attn.v_proj"),
            alone("fc1", "inner", "hidden", "enable_bias", "final_layer_norm"),
            alone("fc2", "hidden", "inner", "enable_bias"),
        ),
        layer_norm("self_attn_layer_norm") | layer_norm("final_layer_norm"),
        sizes={"q": (("hidden_size",),), "kv": (("hidden_size",),)},  # whatever keys for others say
        defaults={"enable_bias": True, "tie_word_embeddings": True}
        | {"max_position_embeddings": 2048, "pad_token_id": 1},
        fixed={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
        counts_positions=True,
        layers_prefix="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        outside={"model.decoder.embed_positions.weight": ("positions + 2", "hidden")}
        | layer_norm("model.decoder.final_layer_norm"),
        intermediate_key="ffn_dim",
        activation_key="activation_function",
        rope_types=(),
    ),
}
"""Families that read text alone, by `model_type`."""

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
        outside=norms("model.language_model.norm"),
    )


FAMILIES: dict[str, Family] = {
    **DECODERS,
    "qwen2_5_vl": replace(
        _reads_images(
            "Qwen2_5_VLForConditionalGeneration", DECODERS["qwen2"], _QWEN_VISION, num_key_value_heads=8
        ),
        rope_aliases={"mrope": "default"},
    ),
    "llava": _reads_images(
        "LlavaForConditionalGeneration",
        DECODERS["llama"],
        _LLAVA_VISION,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
}
"""By `model_type`."""
