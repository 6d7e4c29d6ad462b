"""Calibration text that the model writes itself, against Transformers' own way to generate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from compression import (
    Calibration,
    CompressionError,
    DatasetSpec,
    Evaluation,
    Recipe,
    compress,
    plan,
)
from compression.events import Event, GenerationProgress, PhaseChanged
from compression.families.families import FAMILIES
from compression.model import generate as generation
from compression.model.generate import LIKELIEST, written_by_model
from compression.model.streamed import StreamedModel
from compression.planning.memory import estimate
from compression.planning.plans import Plan
from tests.support.interruption import interrupted
from tests.support.models import load_model, tiny_model

GPTQ = Recipe.from_short("W4A16", has_dataset=True)
SELF = DatasetSpec.model_validate("self")
SMALL = Calibration(num_calibration_samples=4, max_seq_length=48)
FEW = Evaluation(num_samples=2)


def planned(source: Path, **calibration: object) -> Plan:
    settings = SMALL.model_copy(update=calibration)
    return plan(source, GPTQ, dataset=SELF, calibration=settings, evaluation=FEW)


def empty_model(planned: Plan) -> StreamedModel:
    return StreamedModel(planned.checkpoint, planned.layers_prefix, device="cpu", compute_dtype=torch.float32)


@torch.no_grad()
def texts(planned: Plan, folder: Path, **options: int) -> list[str]:
    folder.mkdir()
    spec = written_by_model(planned, empty_model(planned), folder, lambda _done, _total: None, **options)
    return [json.loads(line)["text"] for line in Path(spec.path or "").read_text().splitlines()]


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_likeliest_tokens_are_those_that_transformers_generates(model_type: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", model_type, dtype=torch.float32)
    here = planned(source)
    model = empty_model(here)
    tokenizer = AutoTokenizer.from_pretrained(source)
    reference = load_model(source, dtype=torch.float32)
    with generation._awake(model, 0):
        writer = generation._Writer(model, tokenizer, seed=3)
        begun = torch.tensor([[256, 65], [256, 66]])
        cache, latest, tokens = writer._new_cache(), begun, begun
        for _ in range(LIKELIEST):
            latest = writer._next_logits(latest, cache).argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, latest], dim=1)
    logits = reference(input_ids=tokens, use_cache=False).logits[:, begun.shape[1] - 1 : -1]
    chosen = logits.gather(-1, tokens[:, begun.shape[1] :, None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.amax(-1), atol=1e-4, rtol=0)


def test_layers_that_are_read_for_each_token_write_the_same_text(tiny_llama: Path, tmp_path: Path) -> None:
    here = planned(tiny_llama)
    held = texts(here, tmp_path / "held")
    assert len(held) > 1
    assert texts(here, tmp_path / "streamed", weights_bytes=0) == held


def test_the_seed_decides_the_text(tiny_llama: Path, tmp_path: Path) -> None:
    once, again, other = (
        texts(planned(tiny_llama, seed=seed), tmp_path / name)
        for name, seed in (("once", 0), ("again", 0), ("other", 1))
    )
    assert once == again
    assert once != other


def test_a_file_that_is_there_is_taken_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "generated.jsonl").write_text('{"text": "There already."}\n')
    here = planned(tiny_llama)
    spec = written_by_model(here, empty_model(here), tmp_path, lambda _done, _total: None)
    assert (tmp_path / "generated.jsonl").read_text() == '{"text": "There already."}\n'
    assert spec.path == str(tmp_path / "generated.jsonl")


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_is_compressed_with_text_of_its_own(tiny_llama: Path, tmp_path: Path, packing: bool) -> None:
    events: list[Event] = []
    calibration = SMALL.model_copy(update={"packing": packing})
    report = compress(
        tiny_llama,
        GPTQ,
        tmp_path / "out",
        dataset=SELF,
        calibration=calibration,
        evaluation=FEW,
        on_event=events.append,
    )
    assert report.data is not None
    assert report.data.samples == 4
    assert report.phases["generate"] > 0
    assert [event.phase for event in events if isinstance(event, PhaseChanged)] == [
        "plan", "generate", "compress", "verify",
    ]  # fmt: skip
    told = [event for event in events if isinstance(event, GenerationProgress)]
    assert told[-1].done == told[-1].total
    assert not (tmp_path / "out" / "generated.jsonl").exists()


def test_an_interrupted_run_goes_on_with_the_same_text(tiny_llama: Path, tmp_path: Path) -> None:
    interrupted(
        partial(compress, tiny_llama, GPTQ, dataset=SELF, calibration=SMALL, evaluation=FEW),
        tmp_path,
        layer=0,
    )


def test_an_interrupted_run_goes_on_where_the_text_is_lost(tiny_llama: Path, tmp_path: Path) -> None:
    run = partial(compress, tiny_llama, GPTQ, dataset=SELF, calibration=SMALL, evaluation=FEW)

    def lose(event: Event) -> None:
        if event.type == "layer_solved":
            (scratch,) = tmp_path.glob("cut.partial/*/generated.jsonl")
            scratch.unlink()
            raise KeyboardInterrupt

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", on_event=lose)
    run(tmp_path / "cut")
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "cut" / shard.name).read_bytes()


def test_a_model_that_ends_its_documents_at_once_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    config["eos_token_id"] = list(range(258))
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressionError) as caught:
        compress(source, GPTQ, tmp_path / "out", dataset=SELF, calibration=SMALL, evaluation=FEW)
    assert caught.value.code == "generated_text_too_short"


def test_the_plan_counts_the_memory_and_says_that_it_takes_time(tiny_llama: Path) -> None:
    here = planned(tiny_llama)
    assert "generation_not_in_duration" in {warning.code for warning in here.warnings}
    own = plan(tiny_llama, GPTQ, dataset=DatasetSpec(texts=("a", "b")), calibration=SMALL, evaluation=FEW)
    assert "generation_not_in_duration" not in {warning.code for warning in own.warnings}
    assert replace(here.workload, generates=False) == own.workload
    items = {item.name: item for item in estimate(here.workload).items}
    assert items["layers that write"].bytes == 4 * here.workload.layers_numbers


@pytest.mark.parametrize("field", ["text_column", "messages_column"])
def test_columns_of_text_that_is_not_there_yet_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="no columns"):
        DatasetSpec.model_validate({"generated": True, field: "text"})
