"""What readers compute from a written checkpoint is what the engine computed: logits, so perplexities.

In float32, which every machine computes this model in, for every scheme by every method.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.checkpoint.formats import decode
from compression.data.calibration import load_blocks
from compression.machine import arithmetic as machine
from compression.machine.clock import Clock
from compression.math.comparison import Comparison
from compression.model.activations import Activations
from compression.model.streamed import StreamedModel
from compression.planning.plans import Plan
from compression.report import EvaluationReport
from tests.support import readers
from tests.support.models import tiny_model
from tests.support.recipes import RECIPES

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=8)


class Original(NamedTuple):
    """The source, what Transformers makes of it, and the text that both models are compared on."""

    folder: Path
    logits: Tensor
    tokens: Tensor


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_texts: Path) -> Original:
    folder = tiny_model(tmp_path_factory.mktemp("source") / "model", dtype=torch.float32)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), folder, SMALL, FEW, calibrate=False)
    tokens = torch.stack(blocks.evaluation)
    return Original(folder, readers.logits(folder, tokens), tokens)


@torch.no_grad()
def engine_logits(made: Plan, out: Path, texts: Path) -> tuple[Tensor, Tensor, EvaluationReport]:
    """Of the original and of the compressed model, from the engine's own streams through the written layers,
    as a run that is taken up again replays them; and what it reports of them."""
    made = replace(made, calibrates=False)
    blocks = load_blocks(DatasetSpec(path=str(texts)), made.source, SMALL, FEW, calibrate=False)
    arithmetic = machine.choose("cpu", "F32")
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    with closing(Activations(made, model, blocks, arithmetic, out, Clock())) as streams:
        for layer in made.layers:
            model.load_layer(layer.index)
            streams.pass_original(layer.index)
            stored = load_file(out / layer.shard)
            read = {m.name: decode(m.name, stored, m.scheme, torch.float32) for m in layer.modules}
            model.set_weights(read)
            model.set_parameters({key: stored[key] for key in layer.folded})
            streams.pass_compressed(layer, stored)
            model.drop_layer(layer.index)
        ((before, after, tokens),) = streams.logits()
    comparison = Comparison()
    comparison.add(before, after, tokens)
    return before, after, comparison.report(blocks.split)


@pytest.mark.parametrize("name", RECIPES)
def test_readers_have_the_engines_logits(
    name: str, original: Original, tiny_texts: Path, tmp_path: Path
) -> None:
    recipe, out = Recipe.model_validate(RECIPES[name]), tmp_path / "out"
    dataset = DatasetSpec(path=str(tiny_texts))
    report = compress(
        original.folder, recipe, out, dataset=dataset, calibration=SMALL, evaluation=FEW, device="cpu"
    )
    made = plan(original.folder, recipe, dataset=dataset, calibration=SMALL, evaluation=FEW)
    before, after, measured = engine_logits(made, out, tiny_texts)
    assert measured == report.evaluation  # these logits are the run's own, to the last bit
    assert torch.equal(before, original.logits)

    read = readers.logits(out, original.tokens)
    assert float((after - read).abs().max()) <= 1e-3 * float(read.std())
    assert perplexity(read, original.tokens) == pytest.approx(measured.perplexity_compressed, rel=1e-5)
    assert perplexity(original.logits, original.tokens) == pytest.approx(
        measured.perplexity_original, rel=1e-5
    )
    assert measured.tokens == 8 * 63
    assert len(report.modules) == 14
    bound = 1.0 if recipe.pruning else 0.05
    assert all(0 < row.relative_error < bound for row in report.modules if row.relative_error)


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """Of the next token, in float64."""
    predicted = logits[:, :-1].flatten(0, 1).double()
    return float(torch.nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten()).exp())
