"""Hidden states on disk: the same bits as in memory, and nothing of them left anywhere."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression import Calibration, DatasetSpec, Evaluation, Recipe, ResourceError, compress, plan
from compression.events import Event, LayerSolved
from compression.families.families import FAMILIES
from compression.model.batches import ExpertsInputs, SuspendedBatches
from compression.model.hooks import ForwardHooks
from compression.model.spill import Spill
from compression.model.streamed import StreamedModel
from compression.report import Report
from tests.support.models import load_model, tiny_model

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=4)
SMOOTH = {"type": "smoothquant"}
RECIPES = {
    "gptq": [{"type": "gptq", "scheme": "W4A16"}],
    "rtn, for the report": [{"type": "rtn", "scheme": "W8A8", "observer": "mse"}],
    "smoothquant + gptq": [SMOOTH, {"type": "gptq", "scheme": "W8A8"}],
    "awq": [{"type": "awq", "scheme": "W4A16_ASYM", "n_grid": 3}],
    "sparsegpt": [{"type": "sparsegpt", "mask_structure": "2:4"}],
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    with closing(Spill(tmp_path / "scratch")) as spill:
        yield spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, spill: Spill, tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5).to(dtype) for _ in range(3)]
    copies = [tensor.clone() for tensor in tensors]
    for slot, tensor in enumerate(tensors):
        spill.put_away(tensor, slot)
        assert tensor.untyped_storage().nbytes() == 0
    for slot in (2, 0, 1):
        spill.bring_back(tensors[slot], slot)
        assert torch.equal(tensors[slot], copies[slot])
    view = torch.randn(4, 4)[:2]
    spill.put_away(view, 3)
    assert view.untyped_storage().nbytes()  # not all of it is ours to give back
    assert list((tmp_path / "scratch").iterdir()) == []


def streamed(folder: Path, spill: Spill | None, dtype: torch.dtype) -> tuple[StreamedModel, SuspendedBatches]:
    made = plan(folder, Recipe.from_short("W4A16", method="rtn", has_dataset=False))
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=dtype)
    model.load_embeddings()
    modules = [m for layer in made.layers for m in layer.modules]
    experts = {m.group: m.experts for m in modules if m.experts}
    hooks = ForwardHooks(model, {m.name: m.group for m in modules}, {}, experts=experts)
    batches = [torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    return model, SuspendedBatches(hooks, batches, quantize_activations=False, spill=spill)


def seen(model: StreamedModel, stream: SuspendedBatches) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """Every group's inputs, in order, and the logits."""
    inputs = []
    for index in range(len(model)):
        model.load_layer(index)
        for group in stream.groups(index):
            if isinstance(group, ExpertsInputs):
                for routed in group.inputs:
                    inputs.append((f"{group.experts} hidden_states", routed.hidden_states.clone()))
                    inputs.append((f"{group.experts} top_k_index", routed.top_k_index.clone()))
            else:
                inputs += [(group.group, tensor.clone()) for tensor in group.inputs]
        stream.run_through(index)
        model.drop_layer(index)
    model.load_head()
    return inputs, [logits for logits, _ in stream.finish()]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rehearsals_show_what_parked_batches_show(model_type: str, spill: Spill, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", model_type, layers=3)
    expected, logits = seen(*streamed(folder, None, torch.bfloat16))
    rehearsed, same_logits = seen(*streamed(folder, spill, torch.bfloat16))
    assert [group for group, _ in rehearsed] == [group for group, _ in expected]
    for (_, one), (_, other) in zip(rehearsed, expected, strict=True):
        assert torch.equal(one, other)
    whole = load_model(folder, dtype=torch.bfloat16, experts_implementation="eager")
    for number, (one, other) in enumerate(zip(same_logits, logits, strict=True)):
        assert torch.equal(one, other)
        tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(number))
        assert torch.equal(one, whole(input_ids=tokens, use_cache=False).logits)


def test_parked_batches_hold_no_hidden_state(tiny_llama: Path, spill: Spill) -> None:
    model, stream = streamed(tiny_llama, spill, torch.float32)

    def held() -> list[int]:
        entries = [batch.entry for batch in stream._batches]
        return [entry.hidden_state.untyped_storage().nbytes() for entry in entries if entry]

    embeddings = [batch.entry.hidden_state for batch in stream._batches if batch.entry]
    assert held() == [0, 0, 0]
    model.load_layer(0)
    first = next(iter(next(iter(stream.groups(0))).inputs))
    assert first.shape == (2, 24, 256)
    assert held() == [0, 0, 0]
    stream.run_through(0)
    assert held() == [0, 0, 0]
    assert [tensor.untyped_storage().nbytes() for tensor in embeddings] == [0, 0, 0]


def run(source: Path, output: Path, texts: Path, steps: str, **options: Any) -> Report:
    recipe, dataset = Recipe.model_validate(RECIPES[steps]), DatasetSpec(path=str(texts))
    return compress(source, recipe, output, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


@pytest.mark.parametrize("steps", RECIPES)
def test_a_run_on_disk_gives_the_bytes_of_one_in_memory(steps: str, tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model")
    in_memory = run(source, tmp_path / "memory", tiny_texts, steps)
    on_disk = run(source, tmp_path / "disk", tiny_texts, steps, activation_budget_bytes=1)
    assert "activations_on_disk" in {warning["code"] for warning in on_disk.warnings}
    assert "activations_on_disk" not in {warning["code"] for warning in in_memory.warnings}
    assert on_disk.evaluation == in_memory.evaluation
    assert on_disk.modules == in_memory.modules
    for shard in (tmp_path / "memory").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "disk" / shard.name).read_bytes()
    names = {path.name for path in (tmp_path / "disk").rglob("*")}
    assert names == {path.name for path in (tmp_path / "memory").rglob("*")}


def test_groups_that_read_the_hidden_state_itself_may_keep_what_they_are_shown(
    tiny_texts: Path, tmp_path: Path
) -> None:
    """OLMo 2 has no norm before its attention, and hidden states are taken away again behind each batch."""
    source = tiny_model(tmp_path / "model", "olmo2")
    in_memory = run(source, tmp_path / "memory", tiny_texts, "gptq")
    on_disk = run(source, tmp_path / "disk", tiny_texts, "gptq", activation_budget_bytes=1)
    assert on_disk.modules == in_memory.modules


def test_a_run_may_go_on_with_another_budget(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", layers=3)
    run(source, tmp_path / "whole", tiny_texts, "gptq")

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", tiny_texts, "gptq", on_event=stop)
    report = run(source, tmp_path / "cut", tiny_texts, "gptq", activation_budget_bytes=1)
    assert not report.bytes_may_differ
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes()


def test_a_full_disk_has_its_code(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ResourceError) as caught:
        run(tiny_llama, tmp_path / "out", tiny_texts, "gptq", activation_budget_bytes=1)
    assert caught.value.code == "disk_full"
    assert not (tmp_path / "out").exists()
