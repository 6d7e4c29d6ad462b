"""Scales, codes and activations: against the compressed-tensors library and float64 formulas."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import NumericalError
from compression.math.finite import require_finite_weight
from compression.math.grid import QuantizationParams, QuantizedWeight, fake_quantize, quantize
from compression.math.search import _rounds, minmax_params, search_params
from compression.schemes import Scheme, get_scheme
from tests.compression.grids import WEIGHTS, all_codes, library_args, library_params, restored, spread

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_minmax_has_the_librarys_bits(name: str, dtype: torch.dtype) -> None:
    args = WEIGHTS[name].weights
    weight = gaussian(37, 256, dtype)
    weight[3] = 0.0  # a group of zeros
    weight[5] = weight[5].abs()  # a range that does not hold 0
    scale, zero_point, global_scale = library_params(weight, args)

    params = minmax_params(weight.float(), args, dtype)

    assert params.scale.shape == args.scale_shape((37, 256))
    if args.scale_dtype == "E8M0":
        assert params.scale.dtype == torch.uint8
        expected = scale.float()
        if dtype == torch.float16:  # it has no 2^-127: there the library takes 1 for a group of zeros
            expected[3] = 2.0**-127
        assert torch.equal(2.0 ** (params.scale.float() - 127), expected)
    elif args.scale_dtype == "F8_E4M3":
        assert params.scale.dtype == torch.float8_e4m3fn
        assert params.global_scale is not None
        assert torch.equal(params.global_scale, global_scale) or dtype == torch.float16
        assert torch.equal(params.scale.float(), scale.float()) or dtype == torch.float16
    else:
        assert params.scale.dtype == dtype
        assert torch.equal(params.scale, scale)
    if args.symmetric:
        assert params.zero_point is None
    else:
        assert params.zero_point is not None
        assert params.zero_point.dtype == torch.int8
        rows = [row for row in range(37) if row != 3]  # the library's 0/0 there is undefined
        assert torch.equal(params.zero_point[rows], zero_point[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_the_nearest(name: str, dtype: torch.dtype) -> None:
    args = WEIGHTS[name].weights
    weight = gaussian(16, 128, dtype)
    params = minmax_params(weight, args, dtype)
    codes = quantize(weight, params, args)

    scale, shift = spread(params, args, (16, 128))
    distances = ((all_codes(args) - (weight.double() / scale + shift).unsqueeze(-1)).abs()).amin(-1)
    chosen = (codes.double() - (weight.double() / scale + shift)).abs()
    assert (chosen - distances).max() < 1e-5


@pytest.mark.parametrize("name", ["FP8", "NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_zeros_of_floats_keep_their_sign(name: str) -> None:
    """As in compressed-tensors: the code of a small negative weight is -0."""
    args = WEIGHTS[name].weights
    weight = gaussian(16, 128).sign() * 1e-6
    weight[:, ::16] = 1.0
    codes = quantize(weight, minmax_params(weight, args, torch.float32), args).float()
    assert (codes == 0).any()
    assert torch.equal(codes.signbit(), weight.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_activations_are_rounded_as_the_librarys_quantized_forward_does(
    scheme: str, dtype: torch.dtype
) -> None:
    args = get_scheme(scheme).input_activations
    assert args is not None
    x = (gaussian(6, 40 * 96, seed=3) * 5).reshape(6, 40, 96).to(dtype)
    x[2, 7] = 0.0
    library = library_args(args)
    module = torch.nn.Linear(96, 8)
    module.quantization_scheme = QuantizationScheme(targets=["Linear"], input_activations=library)
    module.quantization_status = QuantizationStatus.FROZEN

    assert torch.equal(fake_quantize(x, args), forward_quantize(module, x, "input", library))
    assert fake_quantize(x, args).dtype == dtype
    by_token = torch.stack([fake_quantize(token, args) for token in x.reshape(-1, 96)])
    assert torch.equal(by_token, fake_quantize(x.reshape(-1, 96), args))  # also without a batch


def cost(
    weight: torch.Tensor, params: QuantizationParams, scheme: Scheme, hessian: torch.Tensor
) -> torch.Tensor:
    """Errors through each group's own block of `hessian` [in, in], those of a scale summed; float64."""
    args = scheme.weights
    codes = quantize(weight, params, args)
    errors = restored(codes, params, args) - weight.double()
    size = args.columns or weight.shape[1]
    by_row = torch.stack(
        [
            torch.einsum("oi,ij,oj->o", errors[:, group], hessian[group, group].double(), errors[:, group])
            for group in (slice(i, i + size) for i in range(0, weight.shape[1], size))
        ],
        dim=1,
    )
    if args.strategy not in ("tensor", "block"):
        return by_row
    return torch.stack(
        [rows.sum(0) for rows in by_row.split(128 if args.strategy == "block" else len(weight))]
    )


def statistics(columns: int, observer: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The keywords of search_params for an observer, and the Hessian that measures what it minimizes."""
    x = gaussian(3 * columns, columns, seed=9) @ gaussian(columns, columns, seed=10)
    x[:, ::7] *= 8
    gram = x.t() @ x
    if observer == "imatrix":
        return {"importance": gram.diagonal() / len(x)}, gram.diagonal().diag()
    if observer == "gram":
        return {"gram": gram}, gram
    return {}, torch.eye(columns)


@pytest.mark.parametrize("observer", ["mse", "imatrix", "gram"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_search_is_never_worse_than_minmax(name: str, observer: str) -> None:
    scheme = WEIGHTS[name]
    weight = gaussian(150, 128, torch.bfloat16)
    keywords, hessian = statistics(128, observer)
    found = cost(weight, search_params(weight, scheme.weights, torch.bfloat16, **keywords), scheme, hessian)
    spanned = cost(weight, minmax_params(weight, scheme.weights, torch.bfloat16), scheme, hessian)
    assert (found <= spanned * (1 + 1e-5)).all()
    if name not in ("FP8", "MXFP8A16"):  # a float's steps grow with the number: there is little to find
        assert found.sum() < 0.999 * spanned.sum()


@pytest.mark.parametrize("observer", ["mse", "imatrix", "gram"])
@pytest.mark.parametrize(
    "name", ["W4A16-g32", "W4A16_ASYM-g32", "W4A16-g128", "MXFP4A16", "NVFP4A16", "MXFP8A16"]
)
def test_search_comes_close_to_an_exhaustive_one(name: str, observer: str) -> None:
    scheme = WEIGHTS[name]
    weight = gaussian(40, 128)
    keywords, hessian = statistics(128, observer)
    found = cost(weight, search_params(weight, scheme.weights, torch.float32, **keywords), scheme, hessian)
    best = torch.full_like(found, float("inf"))
    widest, finest = (1.2, 0.004) if scheme.weights.type == "int" else (2.0, 0.008)
    for step in range(200):
        scale, zero, global_scale = library_params(weight, scheme.weights, shrink=widest - finest * step)
        if scheme.weights.scale_dtype == "E8M0":
            scale = (scale.log2() + 127).to(torch.uint8)
        params = QuantizationParams(scale, None if scheme.weights.symmetric else zero, global_scale)
        best = torch.minimum(best, cost(weight, params, scheme, hessian))
    # through a Gram with strong correlations the error jumps from one shrink to the next
    assert found.sum() < (1.1 if observer == "gram" else 1.02) * best.sum()


@pytest.mark.parametrize(
    "name",
    [
        "W4A16-g32",
        "W4A16-g64",
        "W4A16-g128",
        "W4A16_ASYM-g32",
        "W8A16-g128",
        "W8A8",
        "FP8_DYNAMIC",
        "FP8_BLOCK-128",
    ],
)
def test_few_tries_find_what_many_even_steps_do(name: str) -> None:
    """Without data rounding is all there is to wait for: at most ten tries a weight, as good as sixteen."""
    scheme = WEIGHTS[name]
    assert sum(map(len, _rounds(scheme.weights, informed=False))) <= 10
    weight = gaussian(400, 128)
    _, hessian = statistics(128, "mse")
    found = cost(weight, search_params(weight, scheme.weights, torch.bfloat16), scheme, hessian)
    even = torch.full_like(found, float("inf"))
    for step in range(16):
        scale, zero, _ = library_params(weight.bfloat16(), scheme.weights, shrink=1.16 - 0.04 * step)
        params = QuantizationParams(scale, None if scheme.weights.symmetric else zero)
        even = torch.minimum(even, cost(weight, params, scheme, hessian))
    assert found.sum() <= even.sum()


@pytest.mark.parametrize("name", ["W4A16-g32", "W4A16_ASYM-g32", "W8A8"])
def test_gram_with_independent_inputs_is_imatrix(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = gaussian(64, 128)
    importance = gaussian(1, 128, seed=4)[0].exp()
    by_gram = search_params(weight, args, torch.float32, gram=importance.diag())
    by_importance = search_params(weight, args, torch.float32, importance=importance)
    assert (by_gram.scale == by_importance.scale).float().mean() > 0.98  # near ties may fall either way


def test_search_takes_one_kind_of_statistics() -> None:
    args = WEIGHTS["W8A8"].weights
    with pytest.raises(ValueError, match="not both"):
        search_params(gaussian(4, 8), args, torch.float32, importance=torch.ones(8), gram=torch.eye(8))


@pytest.mark.parametrize("observer", ["mse", "imatrix", "gram"])
def test_rows_are_searched_independently(observer: str) -> None:
    args = WEIGHTS["W4A16-g32"].weights
    weight = gaussian(300, 64)
    keywords, _ = statistics(64, observer)
    whole = search_params(weight, args, torch.bfloat16, **keywords)
    parts = [search_params(part, args, torch.bfloat16, **keywords).scale for part in weight.split([100, 200])]
    assert torch.equal(whole.scale, torch.cat(parts))


@given(
    name=st.sampled_from(sorted(WEIGHTS)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-40, 30),
    zero_rows=st.booleans(),
    dead_columns=st.integers(0, 40),
    observer=st.sampled_from(["minmax", "mse", "imatrix", "gram"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_nothing_makes_nan_or_a_code_out_of_range(
    name: str,
    rows: int,
    groups: int,
    dtype: torch.dtype,
    exponent: int,
    zero_rows: bool,
    dead_columns: int,
    observer: str,
    seed: int,
) -> None:
    args = WEIGHTS[name].weights
    columns = (args.columns or 24) * groups
    weight = gaussian(rows, columns, seed=seed) * 10.0**exponent
    limit = torch.finfo(dtype).max / 4
    weight = weight.clamp(-limit, limit).to(dtype)
    if zero_rows:
        weight[::2] = 0.0
    inputs = gaussian(5, columns, seed=seed + 1)
    inputs[:, :dead_columns] = 0.0
    gram = inputs.t() @ inputs
    if observer == "minmax":
        params = minmax_params(weight, args, dtype)
    else:
        keywords = {"mse": {}, "imatrix": {"importance": gram.diagonal() / 5}, "gram": {"gram": gram}}
        params = search_params(weight, args, dtype, **keywords[observer])
    weight_back = QuantizedWeight(quantize(weight, params, args), params, args)

    smallest, largest = args.range
    codes = weight_back.codes.float()
    assert codes.isfinite().all()
    assert codes.min() >= smallest
    assert codes.max() <= largest
    assert (params.steps(args) > 0).all()
    assert params.steps(args).isfinite().all()
    assert weight_back.dequantize(dtype).isfinite().all()
    assert (weight_back.dequantize(dtype)[weight.float().abs().amax(1) == 0] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = gaussian(8, 16, torch.bfloat16)
    require_finite_weight("model.layers.0.mlp.up_proj", weight)
    weight[3, 5] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj") as caught:
        require_finite_weight("model.layers.0.mlp.up_proj", weight)
    assert caught.value.code == "non_finite_weights"


@pytest.mark.parametrize("name", ["W4A16-g32", "W4A16_ASYM-g32", "W8A8", "FP8_DYNAMIC"])
def test_a_widened_range_may_overflow(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = torch.linspace(0, 3.2e38, 64).repeat(3, 1)  # 1.16 of it is beyond float32
    params = search_params(weight, args, torch.float32)
    assert params.scale.isfinite().all()
    restored_weight = QuantizedWeight(quantize(weight, params, args), params, args).dequantize(torch.float32)
    assert ((restored_weight / weight.max() - weight / weight.max()).abs() < 0.1).all()
