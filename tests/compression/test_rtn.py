"""Round to nearest is the float64 formula, and a stacked solve splits into its parts."""

from __future__ import annotations

import pytest
import torch

from compression.methods.rtn import rtn
from compression.quantizer import minmax_params
from tests.compression.grids import WEIGHTS, restored


@pytest.mark.parametrize("name", WEIGHTS)
def test_error_is_at_most_half_a_step(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = torch.randn(30, 256, generator=torch.Generator().manual_seed(0))
    params = minmax_params(weight, args, torch.float32)
    result = rtn(weight, args, params)
    size = args.group_size or 256
    steps = params.scale.double().repeat_interleave(size, 1)
    errors = (restored(result.codes, *params) - weight.double()).abs()
    if args.type == "float":  # 3 mantissa bits: half a step is 1/16 of the value, or half the smallest code
        assert (errors <= torch.maximum(weight.double().abs() / 16, steps * 2.0**-10) * (1 + 1e-6)).all()
    else:
        rounding = weight.double().abs() * 2.0**-23  # of weight / scale, which is a float32
        assert (errors <= steps * 0.5 + rounding).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_of_a_stacked_solve_are_the_parts(name: str) -> None:
    args = WEIGHTS[name].weights
    weight = torch.randn(30, 128, generator=torch.Generator().manual_seed(1))
    whole = rtn(weight, args, minmax_params(weight, args, torch.bfloat16))
    alone = rtn(weight[10:17], args, minmax_params(weight[10:17], args, torch.bfloat16))
    part = whole.rows(10, 17)
    assert torch.equal(part.codes.float(), alone.codes.float())
    assert torch.equal(part.dequantize(torch.bfloat16), alone.dequantize(torch.bfloat16))
