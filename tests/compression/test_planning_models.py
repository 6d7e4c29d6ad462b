"""Which checkpoints a plan refuses, by config.json and headers."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compression.planning.planner import plan
from tests.compression.fake_checkpoints import (
    TINY,
    fake_llama,
    llama_shapes,
)
from tests.compression.plans import codes, problem_of, problems_of, recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_llama(tmp_path / "model")


class TestModel:
    @pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", None, 7])
    def test_other_architectures_are_refused_by_name(self, tmp_path: Path, model_type: Any) -> None:
        problem = problem_of(fake_llama(tmp_path / "model", model_type=model_type))
        assert problem.code == "unsupported_architecture"
        assert "llama, mistral, qwen2, qwen3, gemma" in problem.hint

    def test_other_heads_are_refused(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", architectures=["LlamaForSequenceClassification"])
        assert problem_of(folder).code == "unsupported_architecture"

    def test_code_of_its_own_is_refused_where_it_would_be_needed(self, tmp_path: Path) -> None:
        auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
        folder = fake_llama(tmp_path / "model", model_type="x-llama", auto_map=auto_map)
        assert codes(problems_of(folder)) == ["remote_code_required", "unsupported_architecture"]

    def test_code_of_its_own_is_ignored_where_it_is_not(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
        assert [warning.code for warning in plan(folder, recipe()).warnings] == ["remote_code_ignored"]

    def test_a_quantization_config(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", quantization_config={"quant_method": "gptq"})
        assert problem_of(folder).code == "source_already_quantized"

    @pytest.mark.parametrize(
        "name", ["weight_scale", "weight_scale_inv", "weight_packed", "qweight", "g_idx", "weight.absmax"]
    )
    def test_a_quantized_tensor(self, tmp_path: Path, name: str) -> None:
        shapes = {**llama_shapes(TINY), f"model.layers.0.mlp.up_proj.{name}": (4,)}
        problem = problem_of(fake_llama(tmp_path / "model", TINY, shapes=shapes))
        assert problem.code == "source_already_quantized"

    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.1.mlp.up_proj.weight",
        ],
    )
    def test_a_missing_tensor_is_named(self, tmp_path: Path, name: str) -> None:
        shapes = llama_shapes(TINY)
        del shapes[name]
        problem = problem_of(fake_llama(tmp_path / "model", TINY, shapes=shapes))
        assert problem.code == "checkpoint_incomplete"
        assert name in problem.message

    @pytest.mark.parametrize("layers", [3, 2**31 - 1])
    def test_layers_that_are_not_there(self, tmp_path: Path, layers: int) -> None:
        start = time.perf_counter()
        problem = problem_of(fake_llama(tmp_path / "model", TINY, num_hidden_layers=layers))
        assert problem.code == "checkpoint_incomplete"
        assert time.perf_counter() - start < 1

    def test_a_shape_that_contradicts_the_config_is_named(self, tmp_path: Path) -> None:
        shapes = {**llama_shapes(TINY), "model.layers.0.self_attn.k_proj.weight": (128, 128)}
        problem = problem_of(fake_llama(tmp_path / "model", TINY, shapes=shapes))
        assert problem.code == "shape_mismatch"
        assert "model.layers.0.self_attn.k_proj.weight is [128, 128]" in problem.message
        assert "[64, 128]" in problem.message

    @pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3"])
    def test_types_that_are_not_compressed(self, tmp_path: Path, dtype: str) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        problem = problem_of(fake_llama(tmp_path / "model", dtypes={name: dtype}))
        assert problem.code == "unsupported_dtype"
        assert f"{name} is {dtype}" in problem.message

    def test_unknown_tensors_are_copied_with_a_warning(self, tmp_path: Path) -> None:
        extra = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.eh_proj.weight")
        shapes = {**llama_shapes(TINY), extra[0]: (16,), extra[1]: (4, 4)}
        made = plan(fake_llama(tmp_path / "model", TINY, shapes=shapes), recipe())
        assert made.unknown == extra
        assert set(extra) <= set(chain.from_iterable(keys for _, keys in made.outside))
        assert [warning.code for warning in made.warnings] == ["unknown_tensors_copied"]

    @pytest.mark.parametrize(
        "change",
        [
            {"hidden_size": None},
            {"vocab_size": -1},
            {"num_hidden_layers": "2"},
            {"intermediate_size": True},
            {"num_attention_heads": 2**70},
            {"num_attention_heads": 1000},
            {"num_key_value_heads": 3},
        ],
    )
    def test_impossible_sizes(self, tmp_path: Path, change: dict[str, Any]) -> None:
        assert set(codes(problems_of(fake_llama(tmp_path / "model", **change)))) == {"config_invalid"}
