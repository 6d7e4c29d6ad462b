"""The plan: every tensor's treatment from headers alone, and every reason why a job cannot succeed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from compression.planning.planner import plan
from compression.planning.plans import Plan
from compression.recipe import Calibration, Evaluation
from tests.compression.fake_checkpoints import (
    LLAMA_3_8B,
    SMOLLM2,
    TINY,
    fake_llama,
    llama_shapes,
    write_config,
)
from tests.compression.plans import DATA, FEW, codes, problem_of, problems_of, recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_llama(tmp_path / "model")


def test_every_tensor_is_planned_once(tmp_path: Path) -> None:
    made = plan(fake_llama(tmp_path / "model", shards=3), recipe())
    compressed = [module.key for layer in made.layers for module in layer.modules]
    copied = [key for layer in made.layers for key in layer.copied]
    outside = list(chain.from_iterable(keys for _, keys in made.outside))
    assert sorted(compressed + copied + outside) == sorted(llama_shapes(TINY))
    assert made.unknown == ()
    assert made.warnings == ()
    assert made.ignore == ("lm_head",)
    assert made.kept[0].reason == "ignored by the recipe"


def test_linears_come_in_forward_order_and_share_inputs(model: Path) -> None:
    layer = plan(model, recipe()).layers[1]
    assert layer.prefix == "model.layers.1."
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert [module.name for module in layer.modules] == [layer.prefix + name for name in names]
    first = ["self_attn.q_proj"] * 3 + ["self_attn.o_proj"] + ["mlp.gate_proj"] * 2 + ["mlp.down_proj"]
    assert [module.group for module in layer.modules] == [layer.prefix + name for name in first]
    assert [module.shape for module in layer.modules[:3]] == [(128, 128), (64, 128), (64, 128)]
    assert {(module.layer, module.step, module.dtype) for module in layer.modules} == {(1, 0, "BF16")}


def test_shards_are_numbered_layers_first(model: Path) -> None:
    made = plan(model, recipe())
    assert [layer.shard for layer in made.layers] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    assert [file for file, _ in made.outside] == ["model-00003-of-00003.safetensors"]


def test_outside_shards_hold_at_most_5_gb(tmp_path: Path) -> None:
    config = {**TINY, "vocab_size": 19_000_000}
    made = plan(fake_llama(tmp_path / "model", config), recipe())
    assert made.outside == (
        ("model-00003-of-00004.safetensors", ("model.embed_tokens.weight", "model.norm.weight")),
        ("model-00004-of-00004.safetensors", ("lm_head.weight",)),
    )


@pytest.mark.parametrize(("config", "layers"), [(SMOLLM2, 30), (LLAMA_3_8B, 32)])
def test_a_plan_takes_under_100_ms(tmp_path: Path, config: Mapping[str, Any], layers: int) -> None:
    folder = fake_llama(tmp_path / "model", config, shards=4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        made = plan(folder, recipe("W4A16", "gptq", group_size=64), dataset=DATA, calibration=FEW)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
    assert len(made.layers) == layers


def test_a_tied_lm_head_is_a_module_without_a_tensor(tmp_path: Path) -> None:
    config = {**TINY, "tie_word_embeddings": True}
    made = plan(fake_llama(tmp_path / "model", config), recipe())
    assert made.ignore == ("lm_head",)
    assert "lm_head.weight" not in chain.from_iterable(keys for _, keys in made.outside)


def test_a_tied_lm_head_that_is_on_disk_is_copied(tmp_path: Path) -> None:
    shapes = llama_shapes(TINY)
    made = plan(fake_llama(tmp_path / "model", TINY, shapes=shapes, tie_word_embeddings=True), recipe())
    assert "lm_head.weight" in chain.from_iterable(keys for _, keys in made.outside)
    assert made.unknown == ()


def test_parameters_are_counted(model: Path) -> None:
    made = plan(model, recipe())
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256
    assert made.compressed_parameters == 2 * layer
    assert made.parameters == 2 * layer + 2 * 96 * 128 + 5 * 128
    assert made.source_bytes == (model / "model.safetensors").stat().st_size


def test_the_dict_is_json_and_names_no_place_on_this_machine(model: Path) -> None:
    made = plan(model, recipe(), dataset=DATA, calibration=FEW)
    text = json.dumps(made.to_dict())
    assert str(model.parent) not in text
    assert json.loads(text)["source"] == "model"
    assert len(json.loads(text)["modules"]) == 14


class TestObserver:
    def test_without_data_it_is_mse(self, model: Path) -> None:
        assert plan(model, recipe()).recipe.steps[0].observer == "mse"

    def test_with_data_it_is_imatrix(self, model: Path) -> None:
        made = plan(model, recipe(), dataset=DATA, calibration=FEW)
        assert made.recipe.steps[0].observer == "imatrix"
        assert made.calibrates

    def test_a_given_one_stays(self, model: Path) -> None:
        made = plan(model, recipe(observer="minmax"), dataset=DATA, calibration=FEW)
        assert made.recipe.steps[0].observer == "minmax"
        assert not made.calibrates


class TestGroupSize:
    def sizes(self, made: Plan) -> set[int | None]:
        schemes = [module.scheme for layer in made.layers for module in layer.modules]
        return {scheme.weights.group_size for scheme in schemes if scheme}

    def test_the_scheme_has_a_default(self, model: Path) -> None:
        assert self.sizes(plan(model, recipe())) == {128}

    @pytest.mark.parametrize("size", [128, 64, 32])
    def test_what_divides_is_taken(self, model: Path, size: int) -> None:
        assert self.sizes(plan(model, recipe(group_size=size))) == {size}

    @pytest.mark.parametrize(("hidden", "expected"), [(256, 128), (192, 64), (96, 32), (80, None)])
    def test_auto_takes_the_largest_that_divides_every_input(
        self, tmp_path: Path, hidden: int, expected: int | None
    ) -> None:
        config = {**TINY, "hidden_size": hidden, "num_attention_heads": 2, "num_key_value_heads": 1}
        made = plan(fake_llama(tmp_path / "model", config), recipe(group_size="auto"))
        assert self.sizes(made) == {expected}
        schemes = [module.scheme for module in made.layers[0].modules]
        assert {scheme.weights.strategy for scheme in schemes if scheme} == {
            "group" if expected else "channel"
        }
        assert made.warnings == ()

    def test_what_does_not_divide_is_refused_with_what_would(self, tmp_path: Path) -> None:
        problem = problem_of(fake_llama(tmp_path / "model", SMOLLM2), recipe(group_size=128))
        assert problem.code == "group_size_does_not_divide"
        assert problem.message.endswith("of 128, 64 and 32, 64, 32 would.")
        assert "(576)" in problem.message
        assert problem.hint == 'Use group_size 64 or "auto".'
        assert problem.pointer == "/recipe/steps/0/group_size"

    def test_where_none_divides_it_says_so(self, tmp_path: Path) -> None:
        config = {**TINY, "hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1}
        problem = problem_of(fake_llama(tmp_path / "model", config), recipe())
        assert problem.message.endswith("none of 128, 64 and 32 would.")
        assert problem.hint == 'Use group_size "auto".'

    def test_only_targets_count(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", SMOLLM2)
        made = plan(folder, recipe(targets=[r"re:.*mlp\.down_proj"]))
        assert self.sizes(made) == {128}

    def test_larger_than_the_input(self, model: Path) -> None:
        assert problem_of(model, recipe(group_size=512)).code == "group_size_does_not_divide"

    def test_zero_points_of_few_outputs_are_refused_where_readers_fail(self, tmp_path: Path) -> None:
        few = fake_llama(tmp_path / "few", {**TINY, "num_attention_heads": 16, "num_key_value_heads": 1})
        problem = problem_of(few, recipe("W4A16_ASYM", group_size=64))
        assert problem.code == "too_few_outputs"
        assert "model.layers.0.self_attn.k_proj has 8" in problem.message
        assert problem.pointer == "/recipe/steps/0/scheme"
        assert plan(few, recipe("W4A16_ASYM", group_size=128))  # one group of 128 columns
        assert plan(few, recipe("W4A16", group_size=64))
        enough = fake_llama(tmp_path / "enough", {**TINY, "num_attention_heads": 8, "num_key_value_heads": 1})
        assert plan(enough, recipe("W4A16_ASYM", group_size=64))

    @pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
    def test_schemes_without_groups_take_none(self, model: Path, scheme: str) -> None:
        assert problem_of(model, recipe(scheme, group_size=64)).code == "group_size_not_applicable"
        assert self.sizes(plan(model, recipe(scheme, group_size="auto"))) == {None}

    def test_vllm_serves_three_sizes(self, model: Path) -> None:
        made = plan(model, recipe(group_size=16))
        assert [warning.code for warning in made.warnings] == ["not_served_by_vllm"]


class TestPatterns:
    def compressed(self, folder: Path, **fields: Any) -> set[str]:
        made = plan(folder, recipe(**fields))
        return {module.name for layer in made.layers for module in layer.modules}

    def test_ignore_wins_over_targets(self, model: Path) -> None:
        names = self.compressed(model, ignore=["lm_head", "re:.*layers.0.*"])
        assert {name.split(".")[2] for name in names} == {"1"}

    def test_names_and_expressions_match_as_in_compressed_tensors(self, model: Path) -> None:
        """re.match: from the beginning, not to the end."""
        assert self.compressed(model, targets=["model.layers.0.mlp.down_proj"]) == {
            "model.layers.0.mlp.down_proj"
        }
        assert self.compressed(model, targets=[r"re:model\.layers\.1\.self_attn\.o"]) == {
            "model.layers.1.self_attn.o_proj"
        }

    @pytest.mark.parametrize("where", ["targets", "ignore"])
    @pytest.mark.parametrize("pattern", ["re:.*experts.*", "re:q_proj", "model.layers.0.mlp", "Conv1D"])
    def test_what_matches_nothing_is_refused(self, model: Path, where: str, pattern: str) -> None:
        """What is to be left out only under `strict`: a recipe serves several models."""
        asked = recipe(**{where: ["Linear" if where == "targets" else "lm_head", pattern]})
        problem = problem_of(model, asked.model_copy(update={"strict": where == "ignore"}))
        assert problem.code == "pattern_matches_nothing"
        assert problem.pointer == f"/recipe/steps/0/{where}/1"
        assert pattern in problem.message

    def test_an_ignore_that_matches_nothing_is_a_warning(self, model: Path) -> None:
        made = plan(model, recipe(ignore=["lm_head", "re:.*vision.*"]))
        (warning,) = made.warnings
        assert (warning.code, warning.pointer) == ("pattern_matches_nothing", "/recipe/steps/0/ignore/1")
        assert "re:.*vision.*" in warning.message
        assert made.layers == plan(model, recipe(ignore=["lm_head"])).layers

    def test_an_expression_that_is_none_is_refused(self, model: Path) -> None:
        problem = problem_of(model, recipe(ignore=["lm_head", "re:*x"]))
        assert (problem.code, problem.pointer) == ("pattern_invalid", "/recipe/steps/0/ignore/1")

    def test_a_list_of_countless_expressions_is_refused(self, model: Path) -> None:
        assert problem_of(model, recipe(ignore=["lm_head", *["re:.*"] * 300])).code == "pattern_invalid"

    def test_ignore_may_name_what_is_no_linear(self, model: Path) -> None:
        assert len(self.compressed(model, ignore=["lm_head", "model.embed_tokens", "re:.*norm"])) == 14

    def test_targets_may_not(self, model: Path) -> None:
        assert problem_of(model, recipe(targets=["model.embed_tokens"])).code == "pattern_matches_nothing"

    def test_nothing_is_left(self, model: Path) -> None:
        assert problem_of(model, recipe(ignore=["Linear"])).code == "nothing_to_compress"

    def test_lm_head_is_not_compressed_yet(self, model: Path) -> None:
        problem = problem_of(model, recipe(ignore=[]))
        assert problem.code == "lm_head_not_supported"
        assert "lm_head" in problem.hint

    @pytest.mark.parametrize(
        "pattern", ["re:.*q_proj", r"re:.*\.0\.mlp\.up_proj", "model.layers.1.self_attn.v_proj"]
    )
    def test_what_vllm_fuses_is_treated_alike(self, model: Path, pattern: str) -> None:
        problem = problem_of(model, recipe(ignore=["lm_head", pattern]))
        assert problem.code == "fused_group_mismatch"
        assert problem_of(model, recipe(targets=[pattern])).code == "fused_group_mismatch"


class TestData:
    def test_gptq_needs_it(self, model: Path) -> None:
        problem = problem_of(model, recipe(type="gptq"))
        assert (problem.code, problem.pointer) == ("dataset_required", "/dataset")

    @pytest.mark.parametrize("observer", ["imatrix", "gram"])
    def test_these_observers_need_it(self, model: Path, observer: str) -> None:
        assert problem_of(model, recipe(observer=observer)).code == "dataset_required"

    def test_parked_activations_that_exceed_the_budget_go_to_disk(self, tmp_path: Path) -> None:
        """Per token of SmolLM2: embedding, layer input, residual and its norm 4 x 576, an MLP input of 1536,
        in float32; 2 x 576 between layers; on disk the hidden state alone."""
        folder = fake_llama(tmp_path / "model", SMOLLM2)
        per_sample, between = (4 * 576 + 1536) * 4 * 2048, 2 * 576 * 4 * 2048
        budget = per_sample * 100 + between * 2 * 3

        def planned(samples: int) -> Plan:
            return plan(
                folder,
                recipe(type="gptq", group_size=64),
                dataset=DATA,
                calibration=Calibration(num_calibration_samples=samples),
                evaluation=Evaluation(num_samples=3),
                activation_budget_bytes=budget,
            )

        fits, spills = planned(100), planned(101)
        assert (fits.spill_bytes, fits.warnings) == (0, ())
        assert spills.spill_bytes == 576 * 4 * 2048 * (101 + 2 * 3)
        assert spills.disk.bytes == fits.disk.bytes + spills.spill_bytes
        assert spills.memory.host_bytes < fits.memory.host_bytes - budget / 2
        (warning,) = spills.warnings
        assert warning.code == "activations_on_disk"
        assert f"would hold {(per_sample + budget) / 1e9:.2f} GB" in warning.message

    def test_the_default_calibration_is_accepted_whatever_the_size(self, tmp_path: Path) -> None:
        made = plan(fake_llama(tmp_path / "model", LLAMA_3_8B), recipe(type="gptq"), dataset=DATA)
        assert made.spill_bytes == 4096 * 4 * 2048 * (512 + 2 * 32)
        assert made.memory.host_bytes < 16e9

    def test_without_calibration_only_the_evaluation_is_parked(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", SMOLLM2)
        assert plan(folder, recipe(group_size=64, observer="minmax"), dataset=DATA)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    shapes = llama_shapes(SMOLLM2)
    del shapes["model.norm.weight"]
    shapes["model.layers.0.mlp.up_proj.weight"] = (7, 7)
    name = "model.layers.1.mlp.up_proj.weight"
    folder = fake_llama(tmp_path / "model", SMOLLM2, shapes=shapes, dtypes={name: "F64"})
    asked = recipe(type="gptq", ignore=["lm_head", "re:.*q_proj", "typo"])
    problems = problems_of(folder, asked.model_copy(update={"strict": True}))
    assert codes(problems) == [
        "dataset_required",
        "checkpoint_incomplete",
        "shape_mismatch",
        "unsupported_dtype",
        "pattern_matches_nothing",
        "fused_group_mismatch",
        "group_size_does_not_divide",
    ]


def test_unreadable_files_come_with_what_is_wrong_with_the_recipe(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    problems = problems_of(tmp_path, recipe(type="gptq"))
    assert codes(problems) == ["weights_missing", "dataset_required"]
    assert problems[0].pointer == "/model"
