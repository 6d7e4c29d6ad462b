"""What is reported of a linear: its error against float64, and the dampening that its Gram matrix needed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.events import Event, WarningRaised
from compression.math.errors import errors_of
from compression.math.gptq import gptq
from compression.math.gram import accumulate_gram
from compression.math.search import minmax_params
from tests.compression.grids import WEIGHTS, correlated_inputs
from tests.support.models import tiny_dataset, tiny_model


@pytest.mark.parametrize(("tokens", "rows"), [(300, 40), (3000, 1100)])
def test_errors_are_those_of_the_outputs(tokens: int, rows: int) -> None:
    """Also where GPTQ has moved nearly all of the error to where no input is."""
    args = WEIGHTS["W4A16-g64"].weights
    x = correlated_inputs(tokens, 256).bfloat16()
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1))
    gram = accumulate_gram([x]).matrix
    meant = gptq(weight, gram, args, minmax_params(weight, args, torch.bfloat16)).weight.dequantize(
        torch.bfloat16
    )
    by_weight, by_output = errors_of(weight, meant, gram)
    difference = weight.double() - meant.double()
    expected = (x.double() @ difference.t()).square().sum() / (
        x.double() @ weight.double().t()
    ).square().sum()
    assert by_weight == pytest.approx(
        float(difference.square().sum() / weight.double().square().sum()), rel=1e-5
    )
    assert by_output == pytest.approx(float(expected), rel=1e-2)


def test_no_error_is_zero_and_a_negative_one_is_not_told() -> None:
    weight, gram = torch.ones(3, 8), torch.eye(8)
    assert errors_of(weight, weight.clone(), gram) == (0.0, 0.0)
    gram[0, 0] = -1.0
    meant = weight.clone()
    meant[:, 0] = 0.0
    assert errors_of(weight, meant, gram) == (1 / 8, None)


def test_what_only_float32_products_find_negative_is_found_again_in_float64() -> None:
    """An error along which the inputs hardly are: its trace is a difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.full((64,), 1e4, dtype=torch.float64)
    spectrum[0] = 1.0
    exact = (basis * spectrum) @ basis.t()
    gram = ((exact + exact.t()) / 2).float()
    weight = torch.randn(200, 64, generator=generator)
    meant = weight - torch.randn(200, 1, generator=generator) * basis[:, 0].float()
    difference = (weight - meant).double()
    found = errors_of(weight, meant, gram)[1]
    expected = (difference @ gram.double() * difference).sum() / (weight.double() @ exact * weight).sum()
    assert found == pytest.approx(float(expected), rel=0.05)


def test_a_trace_within_the_noise_of_float32_is_found_in_float64() -> None:
    """Positive either way: float32 products of this one are several times off."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.ones(256, dtype=torch.float64)
    spectrum[0] = 3e9
    exact = (basis * spectrum) @ basis.t()
    gram = ((exact + exact.t()) / 2).float()
    weight = torch.randn(60, 256, generator=generator)
    quiet = torch.randn(60, 255, generator=generator).double() @ basis[:, 1:].t()  # the loud input sees none
    meant = weight - quiet.float()
    difference = (weight - meant).double()
    expected = (difference @ gram.double() * difference).sum() / (
        weight.double() @ gram.double() * weight.double()
    ).sum()
    in_float32 = (difference.float() @ gram * difference.float()).sum() / (weight @ gram * weight).sum()
    assert float(in_float32) != pytest.approx(float(expected), rel=0.01)
    assert errors_of(weight, meant, gram)[1] == pytest.approx(float(expected), rel=1e-3)


def test_raised_dampening_is_told_in_report_and_events(tmp_path: Path) -> None:
    model, data = tiny_model(tmp_path / "model", layers=1), tiny_dataset(tmp_path / "texts.jsonl")
    asked, events = 1e-12, list[Event]()
    report = compress(
        model,
        Recipe.model_validate([{"type": "gptq", "scheme": "W4A16", "dampening_frac": asked}]),
        tmp_path / "out",
        dataset=DatasetSpec(path=str(data)),
        calibration=Calibration(num_calibration_samples=1, max_seq_length=32),
        evaluation=Evaluation(enabled=False),
        on_event=events.append,
    )
    raised = [row for row in report.modules if row.dampening_frac != asked]
    assert raised
    for row in report.modules:
        assert row.dampening_asked == asked
        assert row.dampening_frac is not None
        assert math.log2(row.dampening_frac / asked) == pytest.approx(
            round(math.log2(row.dampening_frac / asked))
        )
    told = [
        event for event in events if isinstance(event, WarningRaised) and event.code == "dampening_raised"
    ]
    assert len(told) == 1
    assert raised[0].name in told[0].message
    assert {"code": "dampening_raised", "message": told[0].message} in report.warnings
