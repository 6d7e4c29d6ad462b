"""What modules keep besides parameters is as it was found, at every call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compression import Calibration, DatasetSpec, Evaluation, PlanError, Recipe, compress
from compression.model.state import Found, forget_between_calls, stateful, without_storage, without_values
from compression.model.streamed import StreamedModel
from compression.planning.planner import plan
from tests.compression.streaming import logits_of, tokens
from tests.support.interruption import interrupted
from tests.support.models import load_model, tiny_model

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


class Counter(nn.Module):
    """Remembers what it has seen, in every way in which a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Buffer(torch.zeros(2), persistent=False)
        self.longest: Tensor | int = 0
        self.kept = {"first": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum()
        self.longest = x.amax() if x.amax() > self.longest else self.longest
        self.kept["first"] += 1
        self.seen = x
        return x + self.total[0] + self.kept["first"]


def test_every_call_finds_a_module_as_it_was() -> None:
    counter = Counter()
    first = counter(torch.ones(3))
    fresh = Counter()
    forget_between_calls([fresh])
    assert all(torch.equal(fresh(torch.ones(3)), first) for _ in range(3))
    assert not torch.equal(counter(torch.ones(3)), first)


def test_a_run_without_storage_leaves_nothing_behind() -> None:
    with torch.device("meta"):
        counter = Counter()
    assert stateful(nn.Sequential(counter, nn.Linear(1, 1, device="meta"))) == {"0": counter}
    with without_storage([counter]):
        result = counter(torch.ones(3, device="meta"))
    assert (result.device.type, result.shape) == ("meta", (3,))
    assert not hasattr(counter, "seen")
    assert counter.longest == 0
    assert counter.total.is_meta
    assert counter._forward_hooks == {}
    assert counter._forward_pre_hooks == {}
    assert without_values(counter) == ["kept", "total"]
    assert without_values(nn.ModuleDict({"a": counter}), outside=("a.",)) == []
    linear = nn.ModuleDict({"a": nn.Linear(1, 1, device="meta")})
    assert without_values(linear) == ["a.weight", "a.bias"]
    assert without_values(linear, loaded_later=("a.",)) == []


def test_a_tensor_that_nothing_makes_real_is_named(tiny_llama: Path) -> None:
    made = plan(tiny_llama, Recipe.from_short("W4A16", method="rtn", has_dataset=False))
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    model.module.model.rotary_emb.table = {"cos": torch.ones(2, device="meta")}
    with pytest.raises(PlanError, match=r"model\.rotary_emb\.table") as caught:
        model.load_embeddings()
    assert caught.value.code == "plan_mismatch"


@torch.no_grad()
def test_frequencies_of_a_long_batch_are_not_those_of_the_next(tmp_path: Path) -> None:
    """In Transformers they are, until one comes that is shorter than the model was made for."""
    folder = tiny_model(
        tmp_path, dtype=torch.float32, tokenizer=False, max_position_embeddings=32, rope_parameters=DYNAMIC
    )
    long, middle = tokens(1, 64), tokens(1, 40)
    after_long, alone = logits_of(folder, [long, middle])[1], logits_of(folder, [middle])[0]
    assert torch.equal(after_long, alone)
    reference = load_model(folder, dtype=torch.float32)
    assert torch.equal(reference(input_ids=middle, use_cache=False).logits, alone)
    reference(input_ids=long)
    assert not torch.equal(reference(input_ids=middle, use_cache=False).logits, alone)


def test_a_run_that_was_cut_has_the_frequencies_of_a_whole_one(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", layers=3, max_position_embeddings=32, rope_parameters=DYNAMIC)
    run = partial(
        compress,
        source,
        Recipe.from_short("W4A16", has_dataset=True),
        dataset=DatasetSpec(path=str(tiny_texts)),
        calibration=Calibration(num_calibration_samples=6, max_seq_length=96, packing=False),
        evaluation=Evaluation(num_samples=3),
    )
    report = interrupted(run, tmp_path, layer=1)
    assert "beyond_max_position_embeddings" in [warning["code"] for warning in report.warnings]


def test_what_was_found_is_put_back_more_than_once() -> None:
    counter = Counter()
    found = Found(counter)
    for _ in range(2):
        counter(torch.ones(2))
        found.put_back()
        assert counter.kept == {"first": torch.ones(1)}
        assert torch.equal(counter.total, torch.zeros(2))
