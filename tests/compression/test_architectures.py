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

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.data.calibration import load_blocks
from compression.families.decoder import Decoder, read_decoder
from compression.families.families import FAMILIES
from tests.support.models import single_experts, tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)
LEAVES = ("weight", "bias")


SMOOTH = {"type": "smoothquant", "smoothing_strength": 0.8}
RECIPES = {
    "gptq W4A16": [{"type": "gptq", "scheme": "W4A16"}],
    "rtn FP8_DYNAMIC": [{"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    "smoothquant + gptq W8A8": [SMOOTH, {"type": "gptq", "scheme": "W8A8"}],
}


@pytest.mark.parametrize("steps", RECIPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_compressed_model_loads_back_and_is_as_good_as_reported(
    model_type: str, steps: str, tiny_texts: Path, tmp_path: Path
) -> None:
    source, out = tiny_model(tmp_path / "model", model_type, dtype=torch.float32), tmp_path / "out"
    dataset = DatasetSpec(path=str(tiny_texts))
    family = FAMILIES[model_type]
    norms = {group.norm for group in family.groups if group.norm}
    recipe = Recipe.model_validate([step for step in RECIPES[steps] if step != SMOOTH or norms])
    report = compress(source, recipe, out, dataset=dataset, calibration=SMALL, evaluation=FEW)
    blocks = load_blocks(dataset, source, SMALL, FEW).evaluation
    assert report.evaluation is not None
    assert perplexity(source, blocks) == pytest.approx(report.evaluation.perplexity_original, rel=1e-6)
    assert perplexity(out, blocks) == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)

    tensors = plan(source, recipe, dataset=dataset).checkpoint.tensors
    names = {info.name: name for name, info in tensors.items()}
    stored = single_experts(load_file(source / "model.safetensors"))
    before = {names[key]: tensor for key, tensor in stored.items()}
    after = {
        names.get(key, key): tensor
        for shard in out.glob("*.safetensors")
        for key, tensor in load_file(shard).items()
    }
    compressed = {f"{row.name}.weight" for row in report.modules}
    decoder = read_decoder(json.loads((source / "config.json").read_text()))
    assert isinstance(decoder, Decoder)
    shapes = [decoder.layer(index) for index in (0, 1)]
    linears = [linear for shape in shapes for group in shape.groups for linear in group.linears]
    assert len(compressed) == sum(not linear.gate for linear in linears)
    assert compressed <= before.keys()
    folded = {
        f"{family.layers_prefix}{index}.{group.norm}.{leaf}"
        for index, shape in enumerate(shapes)
        for group in shape.groups
        for leaf in LEAVES
    }
    for name in before.keys() - compressed - (folded if recipe.smoothing else set()):
        assert torch.equal(after[name], before[name]), name
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    gates = []
    for index, shape in enumerate(shapes):
        gated = [linear.name for group in shape.groups for linear in group.linears if linear.gate]
        gates += [f"{family.layers_prefix}{index}.{name}" for name in (*gated, *shape.routers)]
    stored = {name: key for key, name in names.items()}
    beside = sorted(name for name in before if name.startswith(family.vision.modules))
    matrices = [name for name in beside if before[name].dim() == 2]
    tower = [key.removesuffix(".weight") for name in matrices for key in (name, stored[name])]
    assert quantization["ignore"] == [*gates, "lm_head", *dict.fromkeys(tower)]
