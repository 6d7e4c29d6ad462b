"""Plans that readers would not read: who is required, and what vLLM's source says.

What Transformers does is held by tests/conformance/test_transformers.py, which loads what is written.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from compression.planning.planner import Require, plan
from compression.recipe import Recipe
from compression.run.config import quantization_config
from tests.compression.fake_checkpoints import TINY, fake_llama
from tests.compression.plans import codes, problem_of, recipe
from tests.support.models import tiny_model

VLLM, TRANSFORMERS = "not_served_by_vllm", "not_loaded_by_transformers"


@pytest.mark.parametrize(
    ("scheme", "require", "code"),
    [
        ("W3A16", "vllm", VLLM),
        ("W3A16", "transformers", None),
        ("W3A16", "both", VLLM),
        ("W4A16_ASYM", "vllm", None),
        ("W4A16_ASYM", "transformers", TRANSFORMERS),
        ("W4A16_ASYM", "both", TRANSFORMERS),
    ],
)
def test_a_reader_that_is_required(scheme: str, require: Require, code: str | None, tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    if code is None:
        assert len(plan(folder, recipe(scheme), require=require).warnings) == 1
    else:
        assert problem_of(folder, recipe(scheme), require=require).code == code


class TestVllm:
    @pytest.mark.parametrize(("size", "served"), [(128, True), (64, False), ("auto", True)])
    def test_int4_beside_fp8_takes_groups_of_128(self, size: int | str, served: bool, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model", {**TINY, "hidden_size": 256})
        made = plan(folder, recipe("W4AFP8", group_size=size))
        assert codes(list(made.warnings)) == ([] if served else [VLLM])

    def test_and_no_scale_per_channel(self, tmp_path: Path) -> None:
        config = {**TINY, "hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 1}
        folder = fake_llama(tmp_path / "model", config)
        warnings = plan(folder, recipe("W4AFP8", group_size="auto")).warnings
        assert "one scale per channel" in warnings[0].message
        assert plan(folder, recipe("W4A16", group_size="auto")).warnings == ()

    @pytest.mark.parametrize(("width", "served"), [(256, True), (128, False)])
    def test_int4_beside_fp8_takes_experts_in_multiples_of_256(
        self, width: int, served: bool, tmp_path: Path
    ) -> None:
        folder = tiny_model(
            tmp_path / "model", "qwen3_moe", hidden_size=256, moe_intermediate_size=width, tokenizer=False
        )
        assert codes(list(plan(folder, recipe("W4AFP8")).warnings)) == ([] if served else [VLLM])

    def test_int4_beside_int8_takes_no_experts(self, tmp_path: Path) -> None:
        folder = tiny_model(tmp_path / "model", "qwen3_moe", tokenizer=False)
        assert problem_of(folder, recipe("W4A8"), require="vllm").code == VLLM
        assert plan(folder, recipe("W4A8", ignore=["lm_head", "re:.*experts.*"]), require="vllm")


def test_with_several_schemes_experts_are_one_expression(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3_moe", tokenizer=False)
    steps = [
        {"type": "rtn", "scheme": "FP8_DYNAMIC", "targets": [r"re:.*self_attn.*"]},
        {"type": "rtn", "scheme": "W4A16"},
    ]
    written = quantization_config(plan(folder, Recipe.model_validate(steps)))
    assert written is not None
    attention, rest = (group["targets"] for group in written["config_groups"].values())
    assert attention[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert rest == [
        r"re:.*layers\.0\.mlp\.experts\..*",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
