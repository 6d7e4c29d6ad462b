"""GPTQ against algorithm 1 of the paper, written out in float64 with its matrix inverse."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression.errors import NumericalError
from compression.math.gptq import dampened_cholesky, gptq
from compression.math.grid import QuantizationParams, rtn
from compression.math.grid import Rounded as GPTQResult
from compression.math.search import minmax_params
from compression.schemes import QuantizationArgs
from tests.compression.grids import BY_ROW, WEIGHTS, all_codes, correlated_inputs, restored, spread


def problem(rows: int, columns: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs."""
    x = correlated_inputs(tokens, columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.t() @ x


def reference(
    weight: Tensor, gram: Tensor, args: QuantizationArgs, params: QuantizationParams, *, static: bool
) -> Tensor:
    """Algorithm 1, one column after the other, in float64: the dequantized weight [out, in]."""
    scales, shifts = spread(params, args, (weight.shape[0], weight.shape[1]))
    grid = all_codes(args)

    order = gram.diagonal().argsort(descending=True, stable=True) if static else torch.arange(len(gram))
    hessian = gram.double()[order][:, order]
    dead = hessian.diagonal() == 0
    dampening = 0.01 * hessian.diagonal()[~dead].mean()
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(dampening)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    remaining = weight.double()[:, order]
    remaining[:, dead] = 0.0
    result = torch.empty_like(remaining)
    for i, column in enumerate(order.tolist()):
        scaled = remaining[:, i] / scales[:, column] + shifts[:, column]
        codes = grid[(grid - scaled.unsqueeze(1)).abs().argmin(1)]
        result[:, i] = (codes - shifts[:, column]) * scales[:, column]
        error = (remaining[:, i] - result[:, i]) / upper[i, i]
        remaining[:, i:] -= error.unsqueeze(1) * upper[i, i:]
    return result[:, order.argsort()]


def proxy_loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """tr(D G D^T) in float64."""
    errors = rounded.double() - weight.double()
    return float(torch.einsum("oi,ij,oj->", errors, gram.double(), errors))


def back(result: GPTQResult) -> Tensor:
    return restored(result.weight.codes, result.weight.params, result.weight.args)


@pytest.mark.parametrize("actorder", ["static", None])
@pytest.mark.parametrize("name", WEIGHTS)
def test_loss_is_the_references(name: str, actorder: Literal["static"] | None) -> None:
    args = WEIGHTS[name].weights
    for seed in range(3):
        weight, gram = problem(40, 128 if "128" in name else 160, seed)
        if weight.shape[1] % (args.columns or 1):
            weight, gram = problem(40, 192, seed)
        params = minmax_params(weight, args, torch.bfloat16)
        result = gptq(weight, gram, args, params, actorder=actorder)
        expected = reference(weight, gram, args, params, static=actorder == "static")
        loss, least = proxy_loss(weight, back(result), gram), proxy_loss(weight, expected, gram)
        assert loss == pytest.approx(least, rel=1e-3)
        assert ((back(result) - expected).abs() < 1e-4).double().mean() > 0.995
        assert loss < 0.9 * proxy_loss(weight, restored(rtn(weight, args, params).codes, params, args), gram)


@pytest.mark.parametrize("seed", range(20))
def test_so_it_is_on_random_layers_with_dead_columns_and_few_tokens(seed: int) -> None:
    args = WEIGHTS[sorted(WEIGHTS)[seed % len(WEIGHTS)]].weights
    columns = (args.columns or 50) * (1 + seed % 3)
    weight, gram = problem(7 + 13 * (seed % 5), columns, seed, tokens=columns // 2 + 100 * (seed % 4))
    dead = [3, columns // 2, columns - 1][: seed % 4]
    gram[dead], gram[:, dead] = 0.0, 0.0
    params = minmax_params(weight, args, torch.float32)
    result = gptq(weight, gram, args, params)
    expected = reference(weight, gram, args, params, static=True)
    assert proxy_loss(weight, back(result), gram) == pytest.approx(
        proxy_loss(weight, expected, gram), rel=1e-3
    )
    assert (back(result)[:, dead] == 0).all()


@pytest.mark.parametrize("block_size", [1, 16, 48, 1000])
def test_block_size_changes_speed_only(block_size: int) -> None:
    args = WEIGHTS["W4A16-g32"].weights
    weight, gram = problem(48, 288, 5)
    params = minmax_params(weight, args, torch.float32)
    usual = gptq(weight, gram, args, params)
    other = gptq(weight, gram, args, params, block_size=block_size)
    assert (usual.weight.codes == other.weight.codes).float().mean() > 0.995
    assert proxy_loss(weight, back(other), gram) == pytest.approx(
        proxy_loss(weight, back(usual), gram), rel=1e-3
    )


@pytest.mark.parametrize("name", BY_ROW)
def test_stacked_parts_are_solved_as_if_alone(name: str) -> None:
    args = WEIGHTS[name].weights
    weight, gram = problem(96, 256, 7)
    params = minmax_params(weight, args, torch.bfloat16)
    whole = gptq(weight, gram, args, params).weight
    for start, stop in ((0, 64), (64, 80), (80, 96)):
        part = weight[start:stop]
        alone = gptq(part, gram, args, minmax_params(part, args, torch.bfloat16)).weight
        assert torch.equal(whole.rows(start, stop).codes.float(), alone.codes.float())


@pytest.mark.parametrize("name", WEIGHTS)
def test_independent_inputs_leave_nothing_to_feed_back(name: str) -> None:
    args = WEIGHTS[name].weights
    weight, _ = problem(32, 128, 3)
    params = minmax_params(weight, args, torch.float32)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.1
    result = gptq(weight, importance.diag(), args, params)
    assert torch.equal(result.weight.codes.float(), rtn(weight, args, params).codes.float())


@pytest.mark.parametrize("name", ["W4A16-g32", "W4A16_ASYM-g32", "W8A8", "FP8_DYNAMIC"])
def test_dead_columns_become_zero_and_are_counted(name: str) -> None:
    args = WEIGHTS[name].weights
    weight, gram = problem(32, 128, 11)
    dead = [0, 5, 64, 127]
    gram[dead], gram[:, dead] = 0.0, 0.0
    params = minmax_params(weight, args, torch.float32)
    result = gptq(weight, gram, args, params)
    assert result.dead_columns == 4
    assert (back(result)[:, dead] == 0).all()
    live = [column for column in range(128) if column not in dead]
    if args.group_size is None:  # the rest is solved as if they were not there
        alone = gptq(weight[:, live], gram[live][:, live], args, params)
        assert (result.weight.codes[:, live].float() == alone.weight.codes.float()).float().mean() > 0.995


def test_arguments_are_left_alone() -> None:
    args = WEIGHTS["W4A16-g32"].weights
    weight, gram = problem(8, 64, 2)
    before = weight.clone(), gram.clone()
    params = minmax_params(weight, args, torch.float32)
    gptq(weight, gram, args, params, actorder="static")
    gptq(weight, gram, args, params, actorder=None)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def indefinite(smallest: float) -> Tensor:
    """A symmetric matrix with diagonal 1, one eigenvalue `smallest` and the others equal."""
    return torch.full((64, 64), (smallest - 1) / 63).fill_diagonal_(1.0)


def test_dampening_grows_until_the_factorization_works() -> None:
    args = WEIGHTS["W8A8"].weights
    weight, _ = problem(4, 64, 0)
    params = minmax_params(weight, args, torch.float32)
    for smallest, worked in ((0.5, 0.01), (-0.015, 0.02), (-0.05, 0.08), (-0.5, 0.64), (-0.9, 1.0)):
        assert gptq(weight, indefinite(smallest), args, params).dampening_frac == pytest.approx(worked)
    assert gptq(weight, indefinite(-0.5), args, params, dampening_frac=0.3).dampening_frac == 0.6


@pytest.mark.parametrize("gram", [indefinite(-2.0), torch.full((64, 64), float("nan"))])
def test_a_gram_that_no_dampening_helps_is_an_error(gram: Tensor) -> None:
    args = WEIGHTS["W8A8"].weights
    weight, _ = problem(4, 64, 0)
    with pytest.raises(NumericalError) as caught:
        gptq(weight, gram, args, minmax_params(weight, args, torch.float32))
    assert caught.value.code == "singular_gram"


def test_the_factor_is_that_of_the_dampened_gram() -> None:
    _, gram = problem(4, 96, 1)
    gram[3], gram[:, 3] = 0.0, 0.0
    factor, _ = dampened_cholesky(gram.clone(), 0.05)
    expected = gram.double()
    mean = expected.diagonal().sum() / 95
    expected[3, 3] = 1.0
    expected += 0.05 * mean * torch.eye(96, dtype=torch.float64)
    assert torch.equal(factor, factor.tril())
    assert torch.allclose(factor.double() @ factor.double().t(), expected, rtol=1e-5, atol=1e-5 * float(mean))


@given(
    name=st.sampled_from(sorted(WEIGHTS)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 2),
    tokens=st.integers(1, 80),
    weight_exponent=st.integers(-25, 25),
    input_exponent=st.integers(-12, 12),
    dead_columns=st.integers(0, 40),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_nothing_makes_nan(
    name: str,
    rows: int,
    groups: int,
    tokens: int,
    weight_exponent: int,
    input_exponent: int,
    dead_columns: int,
    zeros: bool,
    seed: int,
) -> None:
    args = WEIGHTS[name].weights
    columns = (args.columns or 24) * groups
    x = correlated_inputs(tokens, columns, seed) * 10.0**input_exponent
    x[:, :dead_columns] = 0.0
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**weight_exponent
    if zeros:
        weight.zero_()
    params = minmax_params(weight, args, torch.float32)
    result = gptq(weight, x.t() @ x, args, params)
    smallest, largest = args.range
    codes = result.weight.codes.float()
    assert codes.isfinite().all()
    assert codes.min() >= smallest
    assert codes.max() <= largest
    assert result.weight.dequantize(torch.float32).isfinite().all()
    assert result.dead_columns >= min(dead_columns, columns)
