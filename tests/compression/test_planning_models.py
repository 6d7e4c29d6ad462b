"""Which checkpoints a plan refuses, by config.json and headers."""

from __future__ import annotations

import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compression.families.decoder import read_decoder
from compression.planning.planner import plan
from compression.recipe import Calibration, Evaluation
from tests.compression.fake_checkpoints import (
    TINY,
    fake_llama,
    llama_shapes,
)
from tests.compression.plans import DATA, codes, problem_of, problems_of, recipe
from tests.support.models import tiny_model


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

    def test_without_an_lm_head_it_is_the_embeddings(self, tmp_path: Path) -> None:
        shapes = llama_shapes(TINY)
        del shapes["lm_head.weight"]
        made = plan(fake_llama(tmp_path / "model", TINY, shapes=shapes), recipe())
        assert [warning.code for warning in made.warnings] == ["tie_flag_contradicts_checkpoint"]
        assert "lm_head.weight is not in the checkpoint" in made.warnings[0].message
        assert made.kept[-1].name == "lm_head"
        del shapes["model.embed_tokens.weight"]
        problem = problem_of(fake_llama(tmp_path / "model", TINY, shapes=shapes))
        assert problem.code == "checkpoint_incomplete"
        assert "model.embed_tokens.weight, lm_head.weight" in problem.message

    @pytest.mark.parametrize(
        ("before", "after", "wrapper"),
        [
            ("model.", "module.model.", "module."),
            ("model.", "_orig_mod.model.", "_orig_mod."),
            ("model.", "module._orig_mod.model.", "module._orig_mod."),
            ("model.layers.", "model._fsdp_wrapped_module.layers.", "_fsdp_wrapped_module."),
            ("self_attn.", "_checkpoint_wrapped_module.self_attn.", "_checkpoint_wrapped_module."),
        ],
    )
    def test_names_of_a_wrapped_model_are_named_as_such(
        self, tmp_path: Path, before: str, after: str, wrapper: str
    ) -> None:
        shapes = {name.replace(before, after, 1): shape for name, shape in llama_shapes(TINY).items()}
        problem = problem_of(fake_llama(tmp_path / "model", TINY, shapes=shapes))
        wrapped = next(name for name in shapes if wrapper in name)
        assert problem.code == "names_of_wrapped_model"
        assert f"{wrapped} for {wrapped.replace(wrapper, '')}" in problem.message
        assert repr(wrapper) in problem.hint

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
            {"max_position_embeddings": 0},
        ],
    )
    def test_impossible_sizes(self, tmp_path: Path, change: dict[str, Any]) -> None:
        assert set(codes(problems_of(fake_llama(tmp_path / "model", **change)))) == {"config_invalid"}

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"hidden_act": "gloo"}, "hidden_act is 'gloo'"),
            ({"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
            ({"pad_token_id": 96}, "pad_token_id is 96 and the vocabulary has 96 tokens"),
            ({"pad_token_id": "0"}, "pad_token_id is '0'"),
            ({"rope_scaling": {"type": "spiral"}}, "rope_scaling.type is 'spiral'"),
            ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type is ['linear']"),
            ({"rope_scaling": 2}, "rope_scaling is 2"),
            (
                {"rope_parameters": {"rope_type": "linear"}},
                "rope_parameters of the kind linear has no factor",
            ),
            ({"rope_scaling": {"type": "longrope"}}, "has no long_factor and no short_factor"),
        ],
    )
    def test_values_that_no_model_can_be_built_with(
        self, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        problem = problem_of(fake_llama(tmp_path / "model", **change))
        assert (problem.code, problem.pointer) == ("config_invalid", "/model")
        assert said in problem.message

    def test_values_of_a_vision_tower_count(self) -> None:
        text = {"model_type": "llama", "hidden_act": "gloo", "num_key_value_heads": 3}
        config = {
            "text_config": text,
            "vision_config": {"hidden_act": "glue"},
            "projector_hidden_act": "glow",
        }
        read = read_decoder({"model_type": "llava", **config})
        assert isinstance(read, list)
        assert [problem.message.split()[1] for problem in read] == ["32"]
        text["num_key_value_heads"] = None
        read = read_decoder({"model_type": "llava", **config})
        assert isinstance(read, list)
        fields = [problem.message.split()[1] for problem in read]
        assert fields == ["hidden_act", "vision_config.hidden_act", "projector_hidden_act"]

    def test_queries_that_are_made_by_one_linear_are_not_deepseeks(self) -> None:
        read = read_decoder({"model_type": "deepseek_v3", "q_lora_rank": None, "hidden_size": 64})
        assert isinstance(read, list)
        assert read[0].code == "unsupported_architecture"
        assert "q_lora_rank is null" in read[0].message


class TestPositions:
    LONG = Calibration(num_calibration_samples=4, max_seq_length=1024)

    def opt(self, folder: Path, positions: int) -> Path:
        return tiny_model(folder, "opt", tokenizer=False, max_position_embeddings=positions)

    def test_there_is_none_beyond_the_last_that_was_learned(self, tmp_path: Path) -> None:
        problem = problem_of(self.opt(tmp_path / "short", 512), dataset=DATA, calibration=self.LONG)
        assert (problem.code, problem.pointer) == ("sequence_too_long", "/calibration/max_seq_length")
        assert "512 positions" in problem.message
        assert plan(self.opt(tmp_path / "long", 1024), recipe(), dataset=DATA, calibration=self.LONG)
        assert plan(tmp_path / "short", recipe(), calibration=self.LONG)  # no sample is ever run
        no_evaluation = {"dataset": DATA, "evaluation": Evaluation(enabled=False)}
        assert plan(tmp_path / "short", recipe(observer="mse"), calibration=self.LONG, **no_evaluation)

    def test_rotary_ones_go_on_with_a_warning(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", max_position_embeddings=1023)
        (warning,) = plan(folder, recipe(), dataset=DATA, calibration=self.LONG).warnings
        assert warning.code == "beyond_max_position_embeddings"
        assert "1024" in warning.message
        assert "1023" in warning.message
        assert plan(folder, recipe(), calibration=self.LONG).warnings == ()
        folder = fake_llama(tmp_path / "model", max_position_embeddings=1024)
        assert plan(folder, recipe(), dataset=DATA, calibration=self.LONG).warnings == ()


def test_what_is_left_out_of_the_copy_is_told(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    kept = {"tokenizer.json", "assets/image.json", "assets/checkpoint-notes/readme.txt"}
    left = {"adapter_config.json", "adapter_model.safetensors", "out/bitmill.json", "out/tokenizer.json"}
    left |= {"out.partial/.bitmill/journal.jsonl", "out.partial/tokenizer.json", "checkpoint-500/vocab.json"}
    left |= {"peer/config.json", "peer/model.safetensors", "peer/tokenizer.json", "runs/checkpoint-2/x.json"}
    left |= {".cache/huggingface/download.json", "checkpoint-500/deep/x.json"}
    for name in kept | left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    made = plan(folder, recipe())
    assert set(made.checkpoint.other_files) == kept
    said = {warning.code: warning.message for warning in made.warnings}
    assert said.keys() == {"adapter_not_applied", "checkpoints_not_copied"}
    assert "adapter_config.json is not copied" in said["adapter_not_applied"]
    folders = "checkpoint-500/, out.partial/, out/, peer/, runs/checkpoint-2/"
    assert folders in said["checkpoints_not_copied"]
