"""What the plan believes about a model is what Transformers builds, and what the engine writes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from compression.checkpoint.formats import encode
from compression.checkpoint.reader import TORCH_DTYPES, read_tensors
from compression.checkpoint.writer import write_shard
from compression.families.decoder import Decoder, read_decoder
from compression.families.families import FAMILIES
from compression.families.naming import on_disk
from compression.families.native_models import NATIVE_MODEL_TYPES
from compression.math.grid import rtn
from compression.math.search import minmax_params
from compression.planning.planner import plan
from compression.recipe import DatasetSpec, Recipe
from compression.schemes import SCHEMES
from tests.support.models import TOWERS, new_model, tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 32}),
    "llama without key/value heads": ("llama", {"num_key_value_heads": None}),
    "mistral": ("mistral", {}),
    "mistral ignores biases": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a head_dim": ("qwen2", {"head_dim": 32}),
    "qwen3": ("qwen3", {}),
    "qwen3 biased": ("qwen3", {"attention_bias": True, "head_dim": 16}),
    "gemma": ("gemma", {}),
    "gemma untied": ("gemma", {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", {}),
    "gemma2 biased": ("gemma2", {"attention_bias": True, "head_dim": 16}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {"pad_token_id": None}),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True, "pad_token_id": None}),
    "granite": ("granite", {}),
    "granite biased": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "glm": ("glm", {"pad_token_id": None}),
    "glm without biases": ("glm", {"attention_bias": False, "pad_token_id": None}),
    "glm4": ("glm4", {"pad_token_id": None}),
    "olmo2": ("olmo2", {}),
    "olmo2 biased": ("olmo2", {"attention_bias": True}),
    "cohere": ("cohere", {}),
    "cohere with norms of q and k": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 3, "moe_intermediate_size": 64, "head_dim": 16}),
    "qwen3_moe with dense layers": ("qwen3_moe", {"num_experts": 3, "mlp_only_layers": [0], "head_dim": 16}),
    "qwen3_moe every second layer": (
        "qwen3_moe",
        {"num_experts": 3, "decoder_sparse_step": 2, "head_dim": 16},
    ),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 3, "shared_expert_intermediate_size": 64}),
    "qwen2_moe without biases": ("qwen2_moe", {"num_experts": 3, "qkv_bias": False, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {"num_experts": 3}),
    "deepseek_v3": ("deepseek_v3", {"n_routed_experts": 8, "first_k_dense_replace": 1}),
    "deepseek_v3 with two shared experts": ("deepseek_v3", {"n_shared_experts": 2, "attention_bias": True}),
    "llama4": ("llama4_text", {"num_local_experts": 3}),
    "llama4 with listed layers": ("llama4_text", {"num_local_experts": 3, "moe_layers": [1]}),
    "llama4 every second layer": (
        "llama4_text",
        {"num_local_experts": 3, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 224},
    ),
    "llama4 without experts": ("llama4_text", {"moe_layers": [], "attention_bias": True}),
    "opt": ("opt", {"ffn_dim": 160, "word_embed_proj_dim": 96}),
    "opt without biases": ("opt", {"ffn_dim": 160, "enable_bias": False, "max_position_embeddings": 77}),
    "llava": ("llava", {}),
    "llava tied and biased": ("llava", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen2_5_vl tied": ("qwen2_5_vl", {"tie_word_embeddings": True}),
}


def test_native_model_types_are_those_of_the_installed_transformers() -> None:
    assert set(CONFIG_MAPPING_NAMES) == NATIVE_MODEL_TYPES
    assert transformers.__version__.startswith("5.23.")


def test_architectures_are_those_of_transformers() -> None:
    for model_type, family in FAMILIES.items():
        by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if model_type in TOWERS:
            by_type = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        assert by_type[model_type] == family.architecture


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_and_shapes_are_those_of_the_model(variant: str) -> None:
    model_type, changes = VARIANTS[variant]
    with torch.device("meta"):
        model = new_model(model_type, {**SIZES, **changes})
    decoder = read_decoder(model.config.to_dict())
    assert isinstance(decoder, Decoder)
    on_disk = revert_weight_conversion(model, model.state_dict())
    vision = decoder.family.vision
    named = {vision.in_model(name): tuple(t.shape) for name, t in on_disk.items()}
    built = {name: shape for name, shape in named.items() if not name.startswith(vision.modules)}
    if model.config.tie_word_embeddings:
        built.pop("lm_head.weight", None)
    planned = dict(decoder.outside_tensors())
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"{decoder.layers_prefix}{layer}."
        planned |= {prefix + name: shape for name, shape in decoder.layer(layer).tensors.items()}
    assert planned == built


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_config_leaves_out_has_the_default_of_transformers(model_type: str) -> None:
    """A config.json may hold little; defaults then come from the configuration class."""
    sizes = {**SIZES, "hidden_size": 384, "num_attention_heads": 96, "ffn_dim": 160, "vocab_size": 200_000}
    del sizes["num_key_value_heads"]
    stated = {"text_config": sizes} if model_type in TOWERS else sizes
    whole = AutoConfig.for_model(model_type, **deepcopy(stated))
    config = whole.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    decoder = read_decoder({"model_type": model_type, **stated})
    assert isinstance(decoder, Decoder)
    assert decoder.sizes["head"] == head_dim
    assert decoder.sizes["kv_heads"] == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert decoder.tied == whole.tie_word_embeddings


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2_5_vl"])
def test_the_planned_size_is_the_written_size_to_the_byte(
    tmp_path: Path, model_type: str, scheme: str
) -> None:
    preset = SCHEMES[scheme]
    whole_groups = preset.weights.columns is not None and not preset.takes_group_size
    sizes = {"hidden": 256, "intermediate": 384} if whole_groups else {"hidden": 192, "intermediate": 224}
    folder = tiny_model(
        tmp_path / "model", model_type, **sizes, heads=sizes["hidden"] // 64, kv_heads=1, tokenizer=False
    )
    group_size = 32 if preset.takes_group_size else None
    recipe = Recipe.from_short(scheme, method="rtn", has_dataset=True, group_size=group_size)
    made = plan(folder, recipe, dataset=DatasetSpec(texts=("some text",)))
    tensors = read_tensors(made.checkpoint, made.checkpoint.tensors)
    size = 0
    for layer in made.layers:
        stored = {key: tensors[key] for key in layer.copied}
        for module in layer.modules:
            assert module.scheme is not None
            args = module.scheme.weights
            weight = tensors[module.key].float()
            params = minmax_params(weight, args, TORCH_DTYPES[module.dtype])
            fixed_input = None
            if name := module.scheme.fixed_input:
                dtype = torch.float32 if name == "input_global_scale" else TORCH_DTYPES[module.dtype]
                fixed_input = torch.ones(1, dtype=dtype)
            stored |= encode(module.name, rtn(weight, args, params), module.scheme, fixed_input)
        size += write_shard(tmp_path / layer.shard, layer.on_disk(stored)).size
    for file, keys in made.outside:
        size += write_shard(tmp_path / file, on_disk(made.checkpoint, keys)).size
    assert size == made.output_bytes
    assert made.disk.bytes > size
