"""The Gram matrix against float64, and what may not change its bits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import NumericalError
from compression.math.gram import CHUNK_TOKENS, Precision, accumulate_gram, require_finite_gram
from tests.compression.grids import correlated_inputs


@pytest.mark.parametrize("columns", [48, 200, 1100])
def test_float32_is_the_sum_over_tokens(columns: int) -> None:
    x = correlated_inputs(3000, columns)
    gram = accumulate_gram([x[:1000].reshape(2, 500, columns), x[1000:]], precision="float32")
    expected = x.double().t() @ x.double()
    assert gram.tokens == 3000
    assert gram.matrix.dtype == torch.float32
    assert torch.allclose(gram.matrix.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    assert torch.allclose(gram.importance().double(), (x.double() ** 2).mean(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mixed_keeps_bfloat16_within_its_rounding_and_others_exact(dtype: torch.dtype) -> None:
    x = (correlated_inputs(3 * CHUNK_TOKENS + 17, 32) * 3).to(dtype)
    expected = x.double().t() @ x.double()
    gram = accumulate_gram([x], precision="mixed")
    scale = expected.diagonal().sqrt().outer(expected.diagonal().sqrt())
    error = ((gram.matrix.double() - expected).abs() / scale).max()
    assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("precision", ["mixed", "float32"])
def test_the_matrix_is_exactly_symmetric(precision: Precision) -> None:
    x = correlated_inputs(5000, 300).bfloat16()
    matrix = accumulate_gram([x], precision=precision).matrix
    assert torch.equal(matrix, matrix.t())


@given(
    cuts=st.lists(st.integers(0, 2 * CHUNK_TOKENS + 100), max_size=6),
    precision=st.sampled_from(["mixed", "float32"]),
)
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_batches(cuts: list[int], precision: Precision) -> None:
    x = correlated_inputs(2 * CHUNK_TOKENS + 100, 8).bfloat16()
    edges = [0, *sorted(cuts), len(x)]
    batches = [x[start:stop] for start, stop in pairwise(edges)]
    whole = accumulate_gram([x], precision=precision)
    cut = accumulate_gram(batches, precision=precision)
    assert torch.equal(whole.matrix, cut.matrix)
    assert whole.tokens == cut.tokens


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="token"):
        accumulate_gram([torch.empty(0, 8)], precision="float32")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x = correlated_inputs(20, 8)
    require_finite_gram("model.layers.3.mlp.down_proj", accumulate_gram([x], precision="float32"))
    x[4, 4] = bad
    gram = accumulate_gram([x], precision="float32")
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp\.down_proj") as caught:
        require_finite_gram("model.layers.3.mlp.down_proj", gram)
    assert caught.value.code == "non_finite_activations"
