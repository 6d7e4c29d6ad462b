"""Every supported architecture: compressed, published, and loaded back by Transformers.

That plan and module tree agree is checked by the run itself (plan_mismatch). Stored in float32, so that the
engine and Transformers compute alike and their perplexities are the same number.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.calibration import load_blocks
from compression.families import FAMILIES
from tests.support.models import tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)


@pytest.mark.parametrize(("scheme", "method"), [("W4A16", "gptq"), ("FP8_DYNAMIC", "rtn")])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_compressed_model_loads_back_and_is_as_good_as_reported(
    model_type: str, scheme: str, method: str, tiny_texts: Path, tmp_path: Path
) -> None:
    source, out = tiny_model(tmp_path / "model", model_type, dtype=torch.float32), tmp_path / "out"
    dataset = DatasetSpec(path=str(tiny_texts))
    recipe = Recipe.from_short(scheme, method=method, has_dataset=True)
    report = compress(source, recipe, out, dataset=dataset, calibration=SMALL, evaluation=FEW)
    blocks = load_blocks(dataset, source, SMALL, FEW).evaluation
    assert report.evaluation is not None
    assert perplexity(source, blocks) == pytest.approx(report.evaluation.perplexity_original, rel=1e-6)
    # compressed-tensors' forward leaves activations without a batch dimension, such as OPT's fc1, unquantized
    tolerance = 5e-3 if (model_type, scheme) == ("opt", "FP8_DYNAMIC") else 1e-6
    assert perplexity(out, blocks) == pytest.approx(report.evaluation.perplexity_compressed, rel=tolerance)

    before = load_file(source / "model.safetensors")
    after = {key: tensor for shard in out.glob("*.safetensors") for key, tensor in load_file(shard).items()}
    compressed = {f"{row.name}.weight" for row in report.modules}
    assert len(compressed) == 2 * len(FAMILIES[model_type].linears())
    assert compressed <= before.keys()
    for name in before.keys() - compressed:
        assert torch.equal(after[name], before[name]), name
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"]
