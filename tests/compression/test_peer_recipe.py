"""Recipe files of LLM Compressor: what it wrote itself, what people write, and what has no counterpart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from compression import CompressionError, DatasetSpec, Evaluation, Plan, Recipe, oneshot, plan
from compression.__main__ import main
from compression.peer_recipe import load_recipe_yaml

WRITTEN = """\
default_stage:
  default_modifiers:
    GPTQModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights:
            num_bits: 4
            type: int
            symmetric: true
            group_size: 64
            strategy: group
            block_structure: null
            dynamic: false
            actorder: !!python/object/apply:compressed_tensors.quantization.quant_args.ActivationOrdering [
              static]
            scale_dtype: null
            zp_dtype: null
            observer: memoryless_minmax
            observer_kwargs: {}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: [lm_head]
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 128
      dampening_frac: 0.01
      actorder: static
      batched_quantization: auto
"""
"""Saved by LLM Compressor 0.14 beside a checkpoint."""


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def read(text: str) -> Recipe:
    return Recipe.model_validate(load_recipe_yaml(text))


def one(name: str, **fields: Any) -> dict[str, Any]:
    return {"default_stage": {"default_modifiers": {name: fields}}}


def test_one_that_it_wrote() -> None:
    ours = {"type": "gptq", "scheme": "W4A16", "group_size": 64, "observer": "minmax"}
    assert read(WRITTEN) == Recipe.model_validate([ours])


def test_one_as_people_write_it() -> None:
    written = read(
        """
        quant_stage:
          quant_modifiers:
            SmoothQuantModifier: {smoothing_strength: 0.8}
            GPTQModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head], actorder: weight}
        """
    )
    smooth = {"type": "smoothquant", "smoothing_strength": 0.8}
    assert written == Recipe.model_validate([smooth, {"type": "gptq", "scheme": "W8A8"}])


def test_modifiers_alone_and_schemes_for_targets() -> None:
    written = read(
        """
        AWQModifier: {duo_scaling: both}
        QuantizationModifier:
          ignore: [lm_head]
          scheme: {FP8_DYNAMIC: ["re:.*down_proj"], W4A16_ASYM: [Linear]}
        """
    )
    rounding = [
        {"type": "rtn", "scheme": "FP8_DYNAMIC", "targets": ["re:.*down_proj"]},
        {"type": "rtn", "scheme": "W4A16_ASYM"},
    ]
    assert written == Recipe.model_validate([{"type": "awq", "duo_scaling": "both"}, *rounding])


def test_pruning_stages_come_in_order() -> None:
    document = {
        "sparsity_stage": {
            "SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["lm_head"]}
        },
        "quantization_stage": {"QuantizationModifier": {"scheme": "FP8_DYNAMIC", "ignore": ["lm_head"]}},
    }
    sparse = {"type": "sparsegpt", "mask_structure": "2:4"}
    assert Recipe.model_validate(document) == Recipe.model_validate(
        [sparse, {"type": "rtn", "scheme": "FP8_DYNAMIC"}]
    )


def test_what_it_would_compress_is_not_left_out_silently() -> None:
    (step,) = Recipe.model_validate(one("GPTQModifier", scheme="W4A16")).steps
    assert step.model_dump()["ignore"] == ()


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (one("QuIPModifier", rotations=["v"]), "QuIPModifier has no counterpart"),
        (one("SmoothQuantModifier", mappings=[["re:.*q_proj"], "re:.*norm"]), "mappings"),
        (one("SmoothQuantModifier", algorithm="log_equalization"), "algorithm"),
        (one("GPTQModifier", scheme="W4A16", actorder="group"), "actorder 'group'"),
        (
            one(
                "GPTQModifier",
                config_groups={"g": {"weights": {**INT4, "actorder": "group"}, "targets": ["Linear"]}},
            ),
            "actorder 'group'",
        ),
        (one("GPTQModifier", scheme="W4A16", observer="entropy"), "observer 'entropy'"),
        (one("SparseGPTModifier", sparsity=0.5, sparsity_profile="owl"), "sparsity_profile"),
        (
            one("QuantizationModifier", config_groups={"g": {"weights": {"num_bits": 5}}}),
            "none of the schemes",
        ),
        ({"default_stage": None}, "holds no fields"),
    ],
)
def test_what_has_no_counterpart_is_named(document: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(document)


@pytest.mark.parametrize(
    "tag", ["os.system ['true']", "compressed_tensors.x ['a', 'b']", "compressed_tensors.x [[]]"]
)
def test_python_objects_are_not_made(tag: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_recipe_yaml(f"GPTQModifier: {{scheme: !!python/object/apply:{tag}}}")


def test_oneshot_takes_the_file(tiny_llama: Path, tiny_texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(WRITTEN)
    report = oneshot(
        model=tiny_llama,
        dataset=str(tiny_texts),
        recipe=str(recipe),
        output_dir=tmp_path / "out",
        max_seq_length=64,
        num_calibration_samples=4,
        evaluation=Evaluation(enabled=False),
    )
    assert {(row.method, row.scheme, row.group_size) for row in report.modules} == {("gptq", "W4A16", 64)}
    written = Recipe.model_validate(load_recipe_yaml((tmp_path / "out" / "recipe.yaml").read_text()))
    assert written == read(WRITTEN)


def test_the_command_line_takes_the_file_and_nothing_beside_it(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("QuantizationModifier: {scheme: FP8_DYNAMIC, ignore: [lm_head]}")
    options = [str(tiny_llama), "--output-dir", str(out), "--recipe", str(recipe)]
    with pytest.raises(SystemExit, match="2"):
        main([*options, "--method", "rtn"])
    assert "leave out --method" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*options[:-1], str(tmp_path / "nothing.yaml")])
    assert "nothing.yaml" in capsys.readouterr().err
    assert main(options) == 0
    assert (out / "config.json").exists()


CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
SAYS_NOTHING = {
    "group_size": None, "block_structure": None, "actorder": None, "scale_dtype": None, "zp_dtype": None,
    "observer": None, "observer_kwargs": {},
}  # fmt: skip


def test_the_cache_as_it_writes_it() -> None:
    asked = one("QuantizationModifier", scheme="FP8", ignore=["lm_head"], kv_cache_scheme=CACHE)
    for written in (CACHE | SAYS_NOTHING, CACHE | {"observer": "static_minmax"}):
        document = one("QuantizationModifier", scheme="FP8", ignore=["lm_head"], kv_cache_scheme=written)
        assert Recipe.model_validate(document) == Recipe.model_validate(asked)


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_what_a_cache_does_not_have_is_named(name: str) -> None:
    written = CACHE | SAYS_NOTHING | {name: {"observer_kwargs": {"bins": 3}}.get(name, "mse")}
    with pytest.raises(ValidationError, match=rf"{name}.*of kv_cache_scheme has no counterpart"):
        Recipe.model_validate(one("QuantizationModifier", scheme="FP8", kv_cache_scheme=written))


def test_sparsity_of_whole_layers(tiny_llama: Path) -> None:
    """Its sparsity modifiers take the linears inside of what they target."""
    inside = {
        module.name
        for layer in plan_of(tiny_llama, "SparseGPTModifier", targets=[r"re:.*layers\.\d+$"]).layers
        for module in layer.modules
    }
    assert len(inside) == 14
    first = plan_of(tiny_llama, "WandaPruningModifier", targets="model.layers.0")
    assert {m.name for layer in first.layers for m in layer.modules} == {
        name for name in inside if ".layers.0." in name
    }
    named = plan_of(tiny_llama, "SparseGPTModifier", targets=["re:.*mlp.down_proj$"])
    assert {m.name for layer in named.layers for m in layer.modules} == {
        name for name in inside if name.endswith("mlp.down_proj")
    }


def plan_of(model: Path, modifier: str, **fields: Any) -> Plan:
    document = {"s_stage": {"run_type": "oneshot", "m_modifiers": {modifier: {"sparsity": 0.5, **fields}}}}
    return plan(model, Recipe.model_validate(document), dataset=DatasetSpec(texts=("a",)))


def test_the_mappings_of_a_llama_are_what_is_smoothed_anyway() -> None:
    smooth = one("SmoothQuantModifier", smoothing_strength=0.8)["default_stage"]["default_modifiers"]
    gptq = {"GPTQModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}
    told = [
        [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
        [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    ]
    with_mappings = {"SmoothQuantModifier": smooth["SmoothQuantModifier"] | {"mappings": told}}
    plain = Recipe.model_validate({"a_stage": {"b_modifiers": smooth | gptq}})
    assert Recipe.model_validate({"a_stage": {"b_modifiers": with_mappings | gptq}}) == plain
    for other in (
        told[:1],
        [*told, [["re:.*o_proj"], "re:.*v_proj"]],
        [[told[0][0], "re:.*norm"], told[1]],
        "x",
        [3],
    ):
        document = {"SmoothQuantModifier": {"mappings": other}, **gptq}
        with pytest.raises(ValidationError, match="mappings"):
            Recipe.model_validate({"a_stage": {"b_modifiers": document}})


STATIC = {**INT4, "actorder": "static"}


def test_the_observer_of_a_modifier_counts_before_that_of_a_group() -> None:
    """As in LLM Compressor 0.14, whose modifier overrides what its config_groups say."""
    groups = {"g": {"weights": {**INT4, "observer": "memoryless_minmax"}}}
    (step,) = Recipe.model_validate(
        one("GPTQModifier", config_groups=groups, weight_observer="memoryless_mse")
    ).steps
    assert step.model_dump()["observer"] == "mse"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"a_stage": {"run_type": "train"}}, "run_type 'train'"),
        (one("QuantizationModifier", scheme="FP8", input_observer="mse"), "input_observer 'mse'"),
(one("QuantizationModifier", scheme="FP8", observer={"input": "mse"}), "input_observer"),
        (
            one("GPTQModifier", scheme="W4A16", config_groups={"g": {"weights": INT4}}),
            "both scheme and config_groups",
        ),
        (
            one("GPTQModifier", scheme="W4A16", observer={"weights": "mse"}, weight_observer="minmax"),
            "both observer and weight_observer",
        ),
        (
            one("GPTQModifier", scheme="W4A16", observer={"weights": "mse"}, input_observer="minmax"),
            "both observer and input_observer",
        ),
        (
            one("GPTQModifier", actorder=None, config_groups={"g": {"weights": STATIC}}),
            "actorder is None, and 'static' in config_groups",
        ),
        (one("GPTQModifier", scheme="W4A16", start=3), "start"),
        (
one("GPTQModifier", config_groups={"g": {"weights": {**INT4, "observer_kwargs": {"a": 1}}}}),
            "observer_kwargs of weights",
        ),
        (
            one("QuantizationModifier", config_groups={"g": {"weights": {**INT4, "sparsity": 1}}}),
            "sparsity of weights",
        ),
        (
            one(
                "QuantizationModifier",
                config_groups={"g": {"weights": {"num_bits": 8, "type": "float", "group_size": 128}}},
            ),
            "none of the schemes",
        ),
        ({3: {}, "GPTQModifier": {"scheme": "W4A16"}}, "steps"),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_named(document: dict[Any, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(document)


def test_strict_stands_beside_stages_and_is_written_only_where_it_is_asked_for() -> None:
    document = one("GPTQModifier", scheme="W4A16")
    lenient, strict = (Recipe.model_validate(document | told) for told in ({}, {"strict": True}))
    assert (lenient.strict, strict.strict) == (False, True)
    assert "strict" not in lenient.model_dump(mode="json")
    assert Recipe.model_validate(strict.model_dump(mode="json")) == strict
    assert Recipe.from_short("W4A16", has_dataset=True, strict=True).strict


def test_a_recipe_file_that_cannot_be_read(tiny_llama: Path, tmp_path: Path) -> None:
    for content in (b"\xff", b"a: [", b"a: 2021-99-99", b"[" * 2000, None):
        path = tmp_path / "recipe.yaml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CompressionError) as caught:
            oneshot(model=tiny_llama, dataset=None, recipe=path, output_dir=tmp_path / "out")
        assert caught.value.code == "recipe_unreadable"
