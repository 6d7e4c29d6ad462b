"""Values of config.json that a plan refuses are those that Transformers cannot build or run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from compression.families.decoder import Decoder, read_decoder
from compression.families.families import FAMILIES
from compression.families.native_values import ROPE_TYPES
from tests.support.models import TOWERS, new_model

ROTARY = [model_type for model_type, family in FAMILIES.items() if family.rope_types]


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    return no_gradients


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_plan_refuses_of_a_config_transformers_cannot_build(model_type: str) -> None:
    """And the other way round, for every kind of rotary embedding, with each of its keys left out once."""
    family = FAMILIES[model_type]
    sizes: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 300, "ffn_dim": 96, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": None,
        "moe_intermediate_size": 32, "word_embed_proj_dim": 128, "qk_rope_head_dim": 32,
    }  # fmt: skip
    changes: list[dict[str, Any]] = [
        {},
        {family.activation_key: "gloo"},
        {family.activation_key: "gelu_new"},
        *({"pad_token_id": token} for token in (300, -301, 299, -300, 5000)),
    ]
    if family.rope_types:
        for kind in (*ROPE_TYPES, "spiral"):
            rope = {
                "rope_type": kind,
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 8,
            }
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
            count = rotary_size(model_type, sizes)
            rope |= (
                {"short_factor": [1.0] * count, "long_factor": [1.0] * count} if kind == "longrope" else {}
            )
            whole = [rope, *({k: v for k, v in rope.items() if k != key} for key in ROPE_TYPES.get(kind, ()))]
            whole += [{**rope, **wrong} for wrong in wrong_values(kind)]
            changes += [{"rope_parameters": of_layers(model_type, each)} for each in whole]
        base = "rope_local_base_freq" if model_type == "gemma3_text" else "rope_theta"  # of its two layers
        changes += [{"rope_parameters": None, base: "1e4"}]
    for change in changes:
        settings = sizes | change
        stated = {"text_config": settings} if model_type in TOWERS else settings
        read = read_decoder({"model_type": model_type, **stated})
        try:
            with torch.device("meta"):
                new_model(model_type, copy.deepcopy(settings))
            built = True
        except Exception:  # whatever the code behind each key raises
            built = False
        assert isinstance(read, Decoder) == built, (change, read)
        if not built:
            assert isinstance(read, list)
            assert {(problem.code, problem.pointer) for problem in read} == {("config_invalid", "/model")}


def wrong_values(kind: str) -> list[dict[str, Any]]:
    """Values of keys with which Transformers computes for this kind, and some that it takes."""
    wrong: list[dict[str, Any]] = [{"rope_theta": "1e4"}]
    if kind not in ("default", "spiral"):
        wrong += [{"factor": "4"}, {"factor": [4.0]}, {"factor": None}]
        wrong += [{"partial_rotary_factor": "1"}]
    if kind in ("yarn", "llama3", "longrope"):
        wrong += [{"original_max_position_embeddings": "8"}, {"original_max_position_embeddings": None}]
    if kind in ("yarn", "longrope"):
        wrong += [{"attention_factor": None}]
    if kind == "yarn":
        wrong += [
            {"beta_fast": "32"},
            {"beta_fast": None},
            {"beta_slow": [1]},
            {"mscale": 1, "mscale_all_dim": "1"},
        ]
    if kind == "llama3":
        wrong += [{"low_freq_factor": None}, {"high_freq_factor": "4"}, {"low_freq_factor": 0}]
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            wrong += [{key: value} for value in (None, 1.0)]
    return wrong


@pytest.mark.parametrize("model_type", ROTARY)
def test_what_fails_in_a_forward_only_is_refused_as_well(model_type: str) -> None:
    """Lists of another length than half a head, in a forward of a certain length; a factor that is text."""
    sizes: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 300, "num_key_value_heads": 2, "head_dim": 48, "pad_token_id": None,
        "moe_intermediate_size": 32, "qk_rope_head_dim": 48,
    }  # fmt: skip
    count = rotary_size(model_type, sizes)
    right = {"short_factor": [1.0] * count, "long_factor": [1.0] * count, "attention_factor": 1.5}
    wrong: list[dict[str, Any]] = [
        {"short_factor": [1.0] * (count - 1)},
        {"long_factor": [1.0] * (count + 1)},
        {"long_factor": "1" * count},
        {"long_factor": ["1"] * count},
        {"short_factor": [None] * count},
        {"attention_factor": "1.5"},
    ]
    for change in ({}, *wrong):
        rope = {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8}
        rope |= right | change
        settings = sizes | {"rope_parameters": of_layers(model_type, rope)}
        stated = {"text_config": settings} if model_type in TOWERS else settings
        read = read_decoder({"model_type": model_type, **stated})
        assert isinstance(read, Decoder) == (not change), (change, read)


def of_layers(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return {kind: dict(rope) for kind in kinds} if model_type == "gemma3_text" else rope


def rotary_size(model_type: str, sizes: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = new_model(model_type, sizes)
    return next(len(b) for n, b in model.named_buffers() if n.endswith("inv_freq") and "vis" not in n)
