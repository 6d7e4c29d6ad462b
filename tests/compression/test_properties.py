"""Whatever the shapes, dtypes and magnitudes: what is written is finite and reads back as it was meant, or an
error says which linear cannot be compressed, and why. The examples are the same on every machine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression import Calibration, CompressionError, DatasetSpec, Evaluation, Recipe, compress
from compression.checkpoint.formats import decode, encode
from compression.errors import NumericalError
from compression.math.awq import awq_scales
from compression.math.gram import Gram, accumulate_gram
from compression.math.scaling import Readers, ToRound, fold_norm
from compression.math.smoothquant import smoothing_scales
from compression.pipeline import Solved, solve, stacks
from compression.planning.plans import ModulePlan
from compression.report import ModuleReport
from compression.run.verify import sha256_of
from compression.schemes import SCHEMES, Scheme, get_scheme
from tests.compression.grids import correlated_inputs
from tests.support.models import tiny_model

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PARENT = "model.layers.0.self_attn"
LEAVES = ("q_proj", "k_proj", "v_proj")
OUT_OF_RANGE = "weights_out_of_range"


def fixed(max_examples: int) -> settings:
    return settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Case:
    """Linears that share an input, and what is done with them. group_size: of schemes that take one."""

    scheme: str | None
    method: str
    observer: str
    pruning: str | None
    mask_structure: str
    group_size: int | None
    dtype: str
    rows: tuple[int, ...]
    groups: int
    tokens: int
    weight_exponent: int
    input_exponent: int
    dead_columns: int
    zeros: str
    seed: int

    @property
    def resolved(self) -> Scheme | None:
        if self.scheme is None:
            return None
        scheme = get_scheme(self.scheme)
        return scheme.with_group_size(self.group_size) if scheme.takes_group_size else scheme

    @property
    def recipe(self) -> Recipe:
        steps: list[dict[str, Any]] = []
        if self.pruning is not None:
            steps.append({"type": self.pruning, "mask_structure": self.mask_structure})
        if self.scheme is not None:
            steps.append({"type": self.method, "scheme": self.scheme, "observer": self.observer})
        return Recipe.model_validate({"steps": steps})

    def linears(self) -> tuple[list[ModulePlan], list[Tensor], Tensor]:
        """Modules, weights [out_i, in] and inputs [tokens, in]."""
        scheme = self.resolved
        columns = self.groups * ((scheme and scheme.weights.columns) or 24)
        step = None if scheme is None else len(self.recipe.steps) - 1
        pruning = None if self.pruning is None else 0
        modules, weights = [], []
        limit = torch.finfo(DTYPES[self.dtype]).max
        generator = torch.Generator().manual_seed(self.seed)
        for leaf, count in zip(LEAVES, self.rows, strict=False):
            name, group = f"{PARENT}.{leaf}", f"{PARENT}.q_proj"
            if scheme is not None and not scheme.weights.symmetric:
                count = max(count, 9)  # the plan refuses fewer
            shape = (count, columns)
            modules.append(
                ModulePlan(name, f"{name}.weight", shape, self.dtype, scheme, step, pruning, 0, group)
            )
            weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**self.weight_exponent
            if self.zeros == "all":
                weight.zero_()
            if self.zeros == "rows":
                weight[::2] = 0.0
            weights.append(weight.clamp(-limit, limit).to(DTYPES[self.dtype]))
        inputs = correlated_inputs(self.tokens, columns, self.seed) * 10.0**self.input_exponent
        inputs[:, : self.dead_columns] = 0.0
        return modules, weights, inputs


QUANTIZING = {
    "method": st.sampled_from(["rtn", "gptq"]),
    "observer": st.sampled_from(["minmax", "mse", "imatrix", "gram"]),
}
CASES = st.builds(
    Case,
    scheme=st.sampled_from([None, *SCHEMES]),
    **QUANTIZING,
    pruning=st.sampled_from([None, None, "sparsegpt", "wanda", "magnitude"]),
    mask_structure=st.sampled_from(["unstructured", "2:4"]),
    group_size=st.sampled_from([None, 8, 32, 128]),
    dtype=st.sampled_from(list(DTYPES)),
    rows=st.lists(st.integers(1, 13), min_size=1, max_size=3).map(tuple),
    groups=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 7, 300]),
    weight_exponent=st.integers(-45, 39),
    input_exponent=st.integers(-22, 15),
    dead_columns=st.sampled_from([0, 0, 1, 9, 1000]),
    zeros=st.sampled_from(["none", "none", "none", "rows", "all"]),
    seed=st.integers(0, 1000),
).filter(lambda case: case.scheme is not None or case.pruning is not None)


@given(CASES)
@fixed(150)
def test_a_solved_linear_is_finite_and_reads_back_or_is_named(case: Case) -> None:
    modules, weights, inputs = case.linears()
    gram = accumulate_gram([inputs])
    largest_input = inputs.abs().amax()
    try:
        solved = [
            each
            for stack in stacks(modules, weights, case.recipe)
            for each in solve(stack, gram, case.recipe, largest_input=largest_input)
        ]
    except NumericalError as error:
        refused(error, case, weights, largest_input)
        return
    assert [each.module for each in solved] == modules
    for each, before in zip(solved, weights, strict=True):
        check(each, before, case)


def refused(error: NumericalError, case: Case, weights: Sequence[Tensor], largest_input: Tensor) -> None:
    """By name, and for a reason."""
    assert PARENT in error.message
    assert error.hint
    limit = torch.finfo(DTYPES[case.dtype]).max
    if error.code == "non_finite_activations":  # of a scale that is fixed
        assert largest_input > limit
        return
    assert error.code == OUT_OF_RANGE
    # asymmetric ranges reach twice as far, errors that are fed back further
    assert max(weight.abs().amax().double() for weight in weights) > limit / 1000


def check(solved: Solved, before: Tensor, case: Case) -> None:
    module, report = solved.module, solved.report
    tensors = encode(module.name, solved.weight, module.scheme, solved.fixed_input)
    read = decode(module.name, tensors, module.scheme, DTYPES[case.dtype])
    assert read.isfinite().all()
    assert sha256_of(read) == report.dequantized_sha256
    assert all(tensor.float().isfinite().all() for tensor in tensors.values())
    finite(report)
    if (before == 0).all():
        assert (read == 0).all()
        assert report.weight_error == 0
    if case.pruning is not None:
        zeros = read == 0
        if case.mask_structure == "2:4":
            assert (zeros.view(len(read), -1, 4).sum(-1) >= 2).all()
        assert report.sparsity == pytest.approx(float(zeros.float().mean()))


def finite(report: ModuleReport) -> None:
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.weight_error >= 0
    assert report.relative_error is None or report.relative_error >= 0


@given(
    scheme=st.sampled_from(list(SCHEMES)),
    dtype=st.sampled_from(list(DTYPES)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 2),
    tokens=st.sampled_from([1, 3, 200]),
    weight_exponent=st.integers(-40, 38),
    input_exponent=st.integers(-22, 15),
    dead_columns=st.sampled_from([0, 1, 9, 1000]),
    dead_weights=st.sampled_from([0, 1, 1000]),
    strength=st.floats(0, 1),
    duo_scaling=st.sampled_from([True, False, "both"]),
    seed=st.integers(0, 1000),
)
@fixed(60)
def test_scales_that_are_folded_are_positive_and_leave_the_function(
    scheme: str,
    dtype: str,
    rows: int,
    groups: int,
    tokens: int,
    weight_exponent: int,
    input_exponent: int,
    dead_columns: int,
    dead_weights: int,
    strength: float,
    duo_scaling: Any,
    seed: int,
) -> None:
    args = get_scheme(scheme).weights
    columns = groups * (args.columns or 24)
    limit = torch.finfo(DTYPES[dtype]).max
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 10.0**weight_exponent
    weight = weight.clamp(-limit, limit).to(DTYPES[dtype]).float()
    weight[:, :dead_weights] = 0.0
    inputs = correlated_inputs(tokens, columns, seed) * 10.0**input_exponent
    inputs[:, :dead_columns] = 0.0
    gram = accumulate_gram([inputs])
    readers = Readers([inputs], gram, [weight], [ToRound(weight, args, DTYPES[dtype])])
    norm = (torch.rand(columns, generator=generator) + 0.5).to(DTYPES[dtype])
    for scales in (
        awq_scales(readers, n_grid=4, duo_scaling=duo_scaling),
        smoothing_scales([inputs], [weight], strength),
    ):
        assert scales.isfinite().all()
        assert (scales > 0).all()
        folded = fold_norm(norm, None, scales, offset=0)
        undone = folded.weight.double() * folded.scales.double()
        torch.testing.assert_close(undone, norm.double(), rtol=1e-6, atol=0)


BF16_LIMIT = torch.finfo(torch.bfloat16).max


def one(weight: Tensor, gram: Gram | None, *steps: dict[str, Any]) -> Solved:
    """One linear, quantized by the last of the steps."""
    recipe = Recipe.model_validate({"steps": list(steps)})
    last = recipe.steps[-1]
    scheme = get_scheme(str(steps[-1]["scheme"])).with_group_size(32)
    dtype = {value: key for key, value in DTYPES.items()}[weight.dtype]
    name = f"{PARENT}.o_proj"
    shape = (weight.shape[0], weight.shape[1])
    step, pruning = recipe.steps.index(last), 0 if len(steps) > 1 else None
    module = ModulePlan(name, f"{name}.weight", shape, dtype, scheme, step, pruning, 0, name)
    (solved,) = solve([(module, weight)], gram, recipe)
    return solved


def identity_gram(columns: int) -> Gram:
    return Gram(torch.eye(columns), columns)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_range_beyond_the_dtype_of_scales_is_refused_by_name(method: str) -> None:
    weight = torch.zeros(12, 64, dtype=torch.bfloat16)
    weight[3, 10], weight[3, 11] = -BF16_LIMIT, BF16_LIMIT
    step = {"type": method, "scheme": "W4A16_ASYM", "observer": "minmax"}
    with pytest.raises(NumericalError, match=r"self_attn\.o_proj") as caught:
        one(weight, identity_gram(64), step)
    assert caught.value.code == OUT_OF_RANGE
    weight[3, 10] = 0
    assert math.isfinite(one(weight, identity_gram(64), step).report.weight_error)


@pytest.mark.parametrize("steps", [("gptq",), ("sparsegpt", "rtn")])
def test_a_singular_gram_is_refused_by_name(steps: Sequence[str]) -> None:
    gram = Gram(torch.full((64, 64), -3.0).fill_diagonal_(1.0), 64)
    written = [{"type": step, **({} if step == "sparsegpt" else {"scheme": "W4A16"})} for step in steps]
    with pytest.raises(NumericalError, match=r"self_attn\.o_proj") as caught:
        one(torch.randn(4, 64), gram, *written)
    assert caught.value.code == "singular_gram"


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_reported_errors_do_not_depend_on_magnitudes(exponent: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** (3 * exponent)
    inputs = correlated_inputs(100, 64) * 2.0**exponent
    gram = accumulate_gram([inputs])
    solved = one(weight, gram, {"type": "rtn", "scheme": "W4A16", "observer": "minmax"})
    assert not isinstance(solved.weight, Tensor)
    before, x = weight.double(), inputs.double()
    lost = before - solved.weight.dequantize(torch.float32).double()
    errors = solved.report.weight_error, solved.report.relative_error
    assert errors == pytest.approx(
        (
            float(lost.square().sum() / before.square().sum()),
            float((x @ lost.T).square().sum() / (x @ before.T).square().sum()),
        ),
        rel=1e-5,
    )


def test_an_error_where_the_output_was_zero_is_not_a_number() -> None:
    weight = torch.zeros(4, 64)
    weight[:, :4] = torch.tensor([1.4, 1.4, -2.8, 7.5])  # a step of 1: they become 1, 1, -3 and 7
    inputs = torch.zeros(1, 64)
    inputs[:, :3] = 1.0
    gram = accumulate_gram([inputs])
    report = one(weight, gram, {"type": "rtn", "scheme": "W4A16", "observer": "minmax"}).report
    assert 0 < report.weight_error < 1e-2
    assert report.relative_error is None


# Whole runs

RECIPES: list[list[dict[str, Any]]] = [
    [{"type": "rtn", "scheme": "FP8"}],
    [{"type": "gptq", "scheme": "NVFP4", "observer": "minmax"}],
    [{"type": "gptq", "scheme": "W4A16_ASYM", "observer": "gram"}],
    [{"type": "rtn", "scheme": "MXFP8"}],
    [{"type": "awq", "n_grid": 3}, {"type": "gptq", "scheme": "W4A16", "group_size": 32}],
    [{"type": "awq", "n_grid": 3, "scheme": "W4A16_ASYM"}],
    [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}],
    [{"type": "smoothquant", "smoothing_strength": 0.9}, {"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    [{"type": "sparsegpt", "mask_structure": "2:4"}, {"type": "gptq", "scheme": "W8A8"}],
    [{"type": "wanda"}, {"type": "rtn", "scheme": "W4AFP8"}],
    [{"type": "sparsegpt"}],
    [{"type": "magnitude"}, {"type": "rtn", "scheme": "FP8_BLOCK"}],
    [{"type": "gptq", "scheme": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}],
]
CHANGED = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm", "up_proj",
    "down_proj", "embed_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One layer of 128 channels, in each dtype."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"layers": 1, "hidden": 128, "intermediate": 128, "heads": 2, "kv_heads": 1, "head_dim": 64}
    return {name: tiny_model(folder / name, dtype=dtype, **sizes) for name, dtype in DTYPES.items()}


@given(
    steps=st.sampled_from(RECIPES),
    dtype=st.sampled_from(list(DTYPES)),
    changed=st.sampled_from(CHANGED),
    factor=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4, 1e9, 1e19, 1e37]),
    tokens=st.sampled_from([2, 64]),
)
@fixed(24)
def test_a_run_gives_finite_numbers_or_names_a_module(
    models: dict[str, Path],
    tiny_texts: Path,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[dict[str, Any]],
    dtype: str,
    changed: str,
    factor: float,
    tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    source = with_factor(models[dtype], folder / "model", changed, factor)
    raised = None
    try:
        report = compress(
            source,
            Recipe.model_validate(steps),
            folder / "out",
            dataset=DatasetSpec(path=str(tiny_texts)),
            calibration=Calibration(num_calibration_samples=1, max_seq_length=tokens),
            evaluation=Evaluation(num_samples=1),
        )
    except CompressionError as error:
        raised = error
    if raised is not None:
        assert raised.code in (OUT_OF_RANGE, "non_finite_activations", "non_finite_logits")
        assert "model.layers.0." in raised.message or raised.code == "non_finite_logits"
        assert raised.hint
        assert factor > 1
        assert not (folder / "out").exists()
        return
    json.dumps(report.to_dict(), allow_nan=False)
    for shard in (folder / "out").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert tensor.float().isfinite().all(), name


def with_factor(source: Path, folder: Path, changed: str, factor: float) -> Path:
    """A copy in which the module of that name has its weight multiplied, within its dtype's range."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    (key,) = (name for name in tensors if name.endswith(f"{changed}.weight"))
    limit = torch.finfo(tensors[key].dtype).max
    tensors[key] = (tensors[key].double() * factor).clamp(-limit, limit).to(tensors[key].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
