"""compressed-tensors 0.19, which LLM Compressor 0.14 and its Transformers have, reads what 0.20 writes."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.checkpoint.formats import decode
from compression.data.calibration import load_blocks
from compression.planning.plans import Plan
from tests.conformance.peer import in_peer
from tests.support import readers
from tests.support.models import tiny_model
from tests.support.recipes import QUANTIZED

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
NONE = Evaluation(enabled=False)


@pytest.fixture(scope="module")
def tokens(checkpoints: Path, tiny_texts: Path) -> Tensor:
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), checkpoints / "model", SMALL, NONE)
    return torch.stack(blocks.calibration)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_texts: Path) -> Path:
    """A folder with a float32 Llama, `model`, and what each recipe makes of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_model(folder / "model", dtype=torch.float32)
    for name, steps in QUANTIZED.items():
        compress(
            folder / "model",
            Recipe.model_validate(steps),
            folder / name,
            dataset=DatasetSpec(path=str(tiny_texts)),
            calibration=SMALL,
            evaluation=NONE,
        )
    return folder


@pytest.fixture(scope="module")
def read(checkpoints: Path, tokens: Tensor) -> Path:
    """What the older library makes of them, in one process."""
    folder = checkpoints / "read"
    folder.mkdir()
    jobs = [
        {
            "checkpoint": str(checkpoints / name),
            "output": str(folder / f"{name}.safetensors"),
            "tokens": tokens.tolist(),
        }
        for name in QUANTIZED
    ]
    in_peer("peer_read.py", folder, request=json.dumps(jobs))
    return folder


def planned(source: Path, name: str, texts: Path) -> Plan:
    recipe = Recipe.model_validate(QUANTIZED[name])
    return plan(source, recipe, dataset=DatasetSpec(path=str(texts)), calibration=SMALL, evaluation=NONE)


@pytest.mark.parametrize("name", QUANTIZED)
def test_both_versions_dequantize_to_the_same_bits(
    name: str, checkpoints: Path, read: Path, tokens: Tensor, tiny_texts: Path
) -> None:
    theirs = load_file(read / f"{name}.safetensors")
    logits = theirs.pop("logits", None)
    shards = (checkpoints / name).glob("*.safetensors")
    tensors = dict(chain.from_iterable(load_file(shard).items() for shard in shards))
    modules = [m for layer in planned(checkpoints / "model", name, tiny_texts).layers for m in layer.modules]
    assert theirs.keys() == {module.name for module in modules}
    for module in modules:
        weight = decode(module.name, tensors, module.scheme, torch.float32)
        assert torch.equal(theirs[module.name].float(), weight), module.name
    assert (logits is None) == name.startswith("W4A16_ASYM")
    if logits is not None:
        ours = readers.logits(checkpoints / name, tokens)
        assert float((ours - logits).abs().max()) <= 1e-3 * float(ours.std())
