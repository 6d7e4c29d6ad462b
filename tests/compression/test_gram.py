"""The Gram matrix against float64, and what may not change its bits."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import NumericalError
from compression.math.gptq import dampened_cholesky
from compression.math.gram import CHUNK_TOKENS, accumulate_gram, require_finite_gram
from tests.compression.grids import correlated_inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [48, 200, 1100])
def test_it_is_the_sum_over_tokens_to_float32_whatever_the_inputs(columns: int, dtype: torch.dtype) -> None:
    x = correlated_inputs(CHUNK_TOKENS + 900, columns).to(dtype)
    gram = accumulate_gram([x[:1000].reshape(2, 500, columns), x[1000:]])
    expected = x.double().t() @ x.double()
    norms = expected.diagonal().sqrt()
    assert gram.tokens == len(x)
    assert gram.matrix.dtype == torch.float32
    assert ((gram.matrix.double() - expected).abs() / norms.outer(norms)).max() < 3e-6
    assert torch.allclose(gram.importance().double(), (x.double() ** 2).mean(0), rtol=1e-5)
    assert torch.equal(gram.matrix, gram.matrix.t())


@pytest.mark.parametrize("tokens", [600, 2 * CHUNK_TOKENS])
def test_it_is_as_positive_definite_as_the_inputs_make_it(tokens: int) -> None:
    """Tokens that lie close together, as behind attention: rounding destroys the small eigenvalues."""
    directions = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    x = (correlated_inputs(tokens, 4, 1) @ directions + 0.03 * correlated_inputs(tokens, 512, 2)).bfloat16()
    matrix = accumulate_gram([x]).matrix.double()
    expected = torch.linalg.eigvalsh(x.double().t() @ x.double())
    assert torch.linalg.eigvalsh(matrix)[0] == pytest.approx(
        float(expected[0]), abs=1e-5 * float(expected.mean())
    )
    assert dampened_cholesky(matrix.float(), 0.001)[1] == 0.001


RANK_OF_PROCESSORS = ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "DEFAULT"]
ACCURACY = """
import torch
from compression.math.gram import accumulate_gram
x = (torch.randn(9000, 192, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
settings = torch.backends.mkldnn.matmul.fp32_precision
matrix = accumulate_gram([x]).matrix
expected = x.double().t() @ x.double()
norms = expected.diagonal().sqrt()
assert torch.backends.mkldnn.matmul.fp32_precision == settings
print(float(((matrix.double() - expected).abs() / norms.outer(norms)).max()))
"""


@pytest.mark.parametrize("level", RANK_OF_PROCESSORS)
def test_lesser_processors_give_float32_as_well(level: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ACCURACY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3e-6


@given(cuts=st.lists(st.integers(0, 2 * CHUNK_TOKENS + 100), max_size=6))
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_batches(cuts: list[int]) -> None:
    x = correlated_inputs(2 * CHUNK_TOKENS + 100, 8).bfloat16()
    edges = [0, *sorted(cuts), len(x)]
    whole = accumulate_gram([x])
    cut = accumulate_gram([x[start:stop] for start, stop in pairwise(edges)])
    assert torch.equal(whole.matrix, cut.matrix)
    assert whole.tokens == cut.tokens


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="token"):
        accumulate_gram([torch.empty(0, 8)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x = correlated_inputs(20, 8)
    require_finite_gram("model.layers.3.mlp.down_proj", accumulate_gram([x]))
    x[4, 4] = bad
    gram = accumulate_gram([x])
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp\.down_proj") as caught:
        require_finite_gram("model.layers.3.mlp.down_proj", gram)
    assert caught.value.code == "non_finite_activations"
