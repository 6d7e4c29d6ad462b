"""Round to nearest is the float64 formula, and a stacked solve splits into its parts."""

from __future__ import annotations

import pytest
import torch

from compression.math.grid import rtn
from compression.math.search import minmax_params
from tests.compression.grids import BY_ROW, WEIGHTS, restored, spread


@pytest.mark.parametrize("name", WEIGHTS)
def test_error_is_at_most_half_a_step(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = torch.randn(30, 256, generator=torch.Generator().manual_seed(0))
    params = minmax_params(weight, args, torch.float32)
    result = rtn(weight, args, params)
    steps, _ = spread(params, args, (30, 256))
    errors = (restored(result.codes, params, args) - weight.double()).abs()
    if args.num_bits == 4 and args.type == "float":  # spacings 0.5, 1 and 2; what is beyond 6 becomes 6
        spacing = torch.where(weight.abs() < 2 * steps, 0.5, torch.where(weight.abs() < 4 * steps, 1.0, 2.0))
        beyond = (weight.double().abs() - 6 * steps).clamp(min=0)
        assert (errors <= torch.maximum(spacing * steps / 2, beyond) * (1 + 1e-6)).all()
        assert (beyond <= steps * 1.01).all()
    elif args.scale_dtype == "E8M0":  # up to 1.75 / 1.75 of 512 is beyond 448
        beyond = (weight.double().abs() - 448 * steps).clamp(min=0)
        half_a_step = torch.maximum(weight.double().abs() / 16, steps * 2.0**-10)
        assert (errors <= torch.maximum(half_a_step, beyond) * (1 + 1e-6)).all()
        assert (beyond == 0).all()
    elif args.type == "float":  # 3 mantissa bits: half a step is 1/16 of the value, or half the smallest code
        assert (errors <= torch.maximum(weight.double().abs() / 16, steps * 2.0**-10) * (1 + 1e-6)).all()
    else:
        rounding = weight.double().abs() * 2.0**-23  # of weight / scale, which is a float32
        assert (errors <= steps * 0.5 + rounding).all()


@pytest.mark.parametrize("name", BY_ROW)
def test_rows_of_a_stacked_solve_are_the_parts(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = torch.randn(30, 128, generator=torch.Generator().manual_seed(1))
    whole = rtn(weight, args, minmax_params(weight, args, torch.bfloat16))
    alone = rtn(weight[10:17], args, minmax_params(weight[10:17], args, torch.bfloat16))
    part = whole.rows(10, 17)
    assert torch.equal(part.codes.float(), alone.codes.float())
    assert torch.equal(part.dequantize(torch.bfloat16), alone.dequantize(torch.bfloat16))
