"""Schemes with scales above rows: of blocks, of tensors, of tensors that vLLM fuses; and what data fixes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import Tensor

from compression.math.gptq import gptq
from compression.math.gram import Gram
from compression.math.grid import QuantizedWeight, fake_quantize, fixed_input_scale
from compression.math.search import minmax_params
from compression.model.activations import LinearGroup
from compression.pipeline import solve, stacks
from compression.planning.planner import plan
from compression.planning.plans import ModulePlan
from compression.recipe import Recipe
from compression.schemes import get_scheme
from tests.compression.fake_checkpoints import SMOLLM2, TINY, fake_llama
from tests.compression.grids import correlated_inputs, library_args
from tests.compression.plans import DATA, FEW, problem_of, recipe
from tests.support.models import tiny_model

ATTENTION = {"q_proj": 160, "k_proj": 64, "v_proj": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["FP8", "FP8_BLOCK", "MXFP8", "MXFP4", "NVFP4"])
def test_activations_are_rounded_as_the_librarys_quantized_forward_does(
    scheme: str, dtype: torch.dtype
) -> None:
    args = get_scheme(scheme).input_activations
    assert args is not None
    x = (torch.randn(6, 40, 256, generator=torch.Generator().manual_seed(3)) * 5).to(dtype)
    x[2, 7] = 0.0
    x[3, 5, :64] *= 1e-4
    module = torch.nn.Linear(256, 8)
    library = library_args(args)
    module.quantization_scheme = QuantizationScheme(targets=["Linear"], input_activations=library)
    module.quantization_status = QuantizationStatus.FROZEN
    fixed = None
    if name := get_scheme(scheme).fixed_input:
        fixed = fixed_input_scale(x.abs().amax() * 0.8, args, dtype)  # some of what is served is beyond
        setattr(module, name, torch.nn.Parameter(fixed, requires_grad=False))

    assert torch.equal(fake_quantize(x, args, fixed), forward_quantize(module, x, "input", library))
    assert fake_quantize(x, args, fixed).dtype == dtype


def solved(
    scheme: str, method: str, rows: dict[str, int], parent: str = "model.layers.0.self_attn"
) -> dict[str, QuantizedWeight]:
    """Linears that share an input of 256 columns, the later ones with smaller weights, solved together."""
    modules, weights = [], []
    for index, (leaf, count) in enumerate(rows.items()):
        name = f"{parent}.{leaf}" if "." not in leaf else leaf
        preset = get_scheme(scheme)
        group = f"{parent}.q_proj"
        modules.append(ModulePlan(name, f"{name}.weight", (count, 256), "BF16", preset, 0, None, 0, group))
        weights.append(torch.randn(count, 256, generator=torch.Generator().manual_seed(index)) / 4**index)
    x = correlated_inputs(600, 256)
    steps = Recipe.model_validate({"steps": [{"type": method, "scheme": scheme, "observer": "mse"}]})
    gram = Gram(x.t() @ x, len(x))
    found = {}
    together = stacks(modules, weights, steps)
    for each in (s for stack in together for s in solve(stack, gram, steps, largest_input=x.abs().amax())):
        assert isinstance(each.weight, QuantizedWeight)
        found[each.module.name.rpartition(".")[2]] = each.weight
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_linears_that_vllm_fuses_have_one_scale(method: str) -> None:
    parts = solved("FP8", method, ATTENTION)
    assert len({float(part.params.scale) for part in parts.values()}) == 1
    parts = solved("NVFP4A16", method, ATTENTION)
    assert len({float(part.params.global_scale) for part in parts.values()}) == 1
    assert parts["k_proj"].params.scale.shape == (64, 16)


def test_linears_of_two_modules_do_not_share_a_scale() -> None:
    rows = {"q_proj": 160, "k_proj": 64, "model.layers.0.mlp.gate_proj": 96}  # as in Cohere
    parts = solved("NVFP4A16", "rtn", rows)
    assert float(parts["q_proj"].params.global_scale) == float(parts["k_proj"].params.global_scale)
    assert float(parts["gate_proj"].params.global_scale) > 4 * float(parts["q_proj"].params.global_scale)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_blocks_do_not_reach_from_one_linear_into_the_next(method: str) -> None:
    together = solved("FP8_BLOCK", method, ATTENTION)
    assert {leaf: tuple(part.params.scale.shape) for leaf, part in together.items()} == {
        "q_proj": (2, 2),
        "k_proj": (1, 2),
        "v_proj": (1, 2),
    }
    alone = solved("FP8_BLOCK", method, {"q_proj": 160})
    assert torch.equal(together["q_proj"].params.scale, alone["q_proj"].params.scale)
    assert torch.equal(together["q_proj"].codes.float(), alone["q_proj"].codes.float())
    assert float(together["v_proj"].params.scale.max()) < float(together["q_proj"].params.scale.min()) / 8


@pytest.mark.parametrize("scheme", ["FP8", "FP8_BLOCK", "MXFP8A16", "MXFP4A16", "NVFP4A16"])
def test_gptq_moves_the_error_of_every_format(scheme: str) -> None:
    """The stacked solve with steps by row is the solve of each linear with scales as they are stored."""
    rows = {"o_proj": 96}
    x = correlated_inputs(600, 256)
    args = get_scheme(scheme).weights
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    by_stack = solved(scheme, "gptq", rows)["o_proj"]
    direct = gptq(weight, x.t() @ x, args, by_stack.params).weight
    assert torch.equal(direct.codes.float(), by_stack.codes.float())

    def loss(part: QuantizedWeight) -> float:
        return float(((part.dequantize(torch.float32) - weight) @ x.t()).square().sum())

    assert loss(by_stack) < 0.9 * loss(solved(scheme, "rtn", rows)["o_proj"])


@pytest.mark.parametrize("exponent", [0, 1, 127, 254])
def test_powers_of_two_are_exact(exponent: int) -> None:
    args = get_scheme("MXFP4A16").weights
    params = minmax_params(torch.ones(1, 32), args, torch.float32)
    steps = params._replace(scale=torch.tensor([[exponent]], dtype=torch.uint8)).steps(args)
    assert float(steps) == 2.0 ** (exponent - 127)


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC"])
def test_the_largest_input_is_looked_for_where_a_scheme_fixes_it(scheme: str, tmp_path: Path) -> None:
    made = plan(fake_llama(tmp_path / "model"), recipe(scheme), dataset=DATA, calibration=FEW)
    module = made.layers[0].modules[0]
    group = LinearGroup((module,), [torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.5]])])
    assert group.largest_input() == (3.0 if scheme == "FP8" else None)


class TestPlan:
    @pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
    def test_what_data_fixes_needs_data(self, scheme: str, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model")
        problem = problem_of(folder, recipe(scheme))
        assert problem.code == "dataset_required"
        assert problem.pointer == "/recipe/steps/0/scheme"
        assert plan(folder, recipe(scheme, observer="mse"), dataset=DATA, calibration=FEW).calibrates

    @pytest.mark.parametrize("scheme", ["FP8_BLOCK", "MXFP8", "MXFP4A16", "NVFP4A16"])
    def test_other_formats_do_not(self, scheme: str, tmp_path: Path) -> None:
        assert not plan(fake_llama(tmp_path / "model"), recipe(scheme)).calibrates

    @pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
    def test_experts_that_may_see_no_token_are_refused_what_data_fixes(
        self, scheme: str, tmp_path: Path
    ) -> None:
        folder = tiny_model(tmp_path / "model", "mixtral", tokenizer=False)
        problem = problem_of(folder, recipe(scheme), dataset=DATA, calibration=FEW)
        assert problem.code == "experts_need_dynamic_activations"
        assert problem.pointer == "/recipe/steps/0/scheme"
        attention = recipe(scheme, ignore=["lm_head", r"re:.*experts.*"])
        assert plan(folder, attention, dataset=DATA, calibration=FEW).calibrates

    def test_inputs_that_blocks_do_not_divide_are_refused(self, tmp_path: Path) -> None:
        problem = problem_of(fake_llama(tmp_path / "model", SMOLLM2), recipe("FP8_BLOCK"))
        assert problem.code == "group_size_does_not_divide"
        assert "576" in problem.message
        assert problem.pointer == "/recipe/steps/0/scheme"

    def test_outputs_that_blocks_do_not_divide_are_not_served(self, tmp_path: Path) -> None:
        made = plan(fake_llama(tmp_path / "model"), recipe("FP8_BLOCK"))  # k_proj has 64 rows
        assert [warning.code for warning in made.warnings] == ["not_served_by_vllm"]
        assert "64 outputs" in made.warnings[0].message
        whole = fake_llama(tmp_path / "whole", {**TINY, "hidden_size": 256, "num_attention_heads": 2})
        assert plan(whole, recipe("FP8_BLOCK")).warnings == ()

    def test_three_bits_are_not_served_and_can_be_refused(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model")
        assert [warning.code for warning in plan(folder, recipe("W3A16")).warnings] == ["not_served_by_vllm"]
        assert problem_of(folder, recipe("W3A16"), require="vllm").code == "not_served_by_vllm"
        assert plan(folder, recipe("W4A16"), require="vllm")

    @pytest.mark.parametrize("scheme", ["FP8", "FP8_BLOCK", "MXFP4", "NVFP4A16"])
    def test_readers_fix_the_group_size(self, scheme: str, tmp_path: Path) -> None:
        problem = problem_of(fake_llama(tmp_path / "model"), recipe(scheme, group_size=64), dataset=DATA)
        assert problem.code == "group_size_not_applicable"

    def test_fp4_is_coarse_enough_for_gptq(self) -> None:
        assert Recipe.from_short("NVFP4", has_dataset=True).steps[0].type == "gptq"
        assert Recipe.from_short("FP8", has_dataset=True).steps[0].type == "rtn"


def test_fp4_rounds_half_to_even() -> None:
    args = get_scheme("MXFP4A16").weights
    params = minmax_params(torch.full((1, 32), 4.0), args, torch.float32)  # a step of 1
    weight = torch.zeros(1, 32)
    weight[0, :9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -2.5])
    codes: Tensor = gptq(weight, torch.eye(32), args, params).weight.codes.float()
    assert codes[0, :9].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]
