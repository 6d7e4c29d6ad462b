"""The factories make what they say, and quickly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compression.families.families import FAMILIES
from tests.support.models import load_model, tiny_model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_tiny_model_loads_and_runs(tmp_path: Path, model_type: str) -> None:
    folder = tiny_model(tmp_path / model_type, model_type)
    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("Füße", return_tensors="pt")
    assert batch["input_ids"].shape == (1, 1 + len("Füße".encode()))
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "Füße"
    logits = model(batch["input_ids"]).logits
    assert model.dtype == torch.bfloat16
    assert 0.1 < logits.float().std() < 10


def test_shards_and_seeds(tmp_path: Path) -> None:
    whole = load_model(tiny_model(tmp_path / "whole", seed=3))
    split = load_model(tiny_model(tmp_path / "split", seed=3, shards=3))
    other = load_model(tiny_model(tmp_path / "other", seed=4))
    assert len(list((tmp_path / "split").glob("*.safetensors"))) == 3
    for (name, left), right in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert not torch.equal(whole.lm_head.weight, other.lm_head.weight)


def test_tied_models_store_no_lm_head(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, tied=True, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert "lm_head.weight" not in index["weight_map"]
