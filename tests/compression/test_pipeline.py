"""A whole run: what is written, what a reader makes of it, and what survives an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compression import (
    Calibration,
    CompressionError,
    DatasetSpec,
    Evaluation,
    Recipe,
    compress,
    oneshot,
    plan,
)
from compression.data.calibration import load_blocks
from compression.events import JOURNAL_FILE, Event, LayerReplayed, LayerSolved, WarningRaised
from compression.model.streamed import StreamedModel
from compression.report import Report
from compression.run.verify import check_against_model, check_files
from tests.support.models import tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=8)
MANY = Evaluation(num_samples=128)
"""8,064 tokens. With 8-bit float activations a token's loss in bfloat16 is 0.1 nats (standard deviation) from
that in float32. The means of so many tokens are then 0.1% apart; those of 504 tokens would be 0.4% apart."""

CHOICES = [
    ("W4A16", "gptq"),
    ("W4A16_ASYM", "gptq"),
    ("W8A8", "gptq"),
    ("W4A16", "rtn"),
    ("W4A16_ASYM", "rtn"),
    ("W8A8", "rtn"),
    ("FP8_DYNAMIC", "rtn"),
    ("FP8_DYNAMIC", "gptq"),
    ("W3A16", "gptq"),
    ("W8A16", "gptq"),
    ("W4A8", "gptq"),
    ("W4AFP8", "gptq"),
    ("FP8", "rtn"),
    ("FP8_BLOCK", "gptq"),
    ("MXFP8", "rtn"),
    ("MXFP4A16", "gptq"),
    ("NVFP4A16", "rtn"),
]
"""MXFP4 and NVFP4 are in test_logits.py only: rounding to bfloat16 in front of activations in 4 bits moves
the perplexity of this model by 1 to 3%, in any reader, so that two dtypes cannot be compared."""


class Killed(BaseException):
    """Stands for what ends a process at a point of our choice."""


def run(source: Path, output: Path, texts: Path | None, scheme: str = "W4A16", **options: object) -> Report:
    method = options.pop("method", None)
    return compress(
        source,
        Recipe.from_short(scheme, method=method, has_dataset=texts is not None),
        output,
        dataset=None if texts is None else DatasetSpec(path=str(texts)),
        calibration=SMALL,
        evaluation=options.pop("evaluation", FEW),
        **options,
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(("scheme", "method"), CHOICES)
def test_reported_perplexity_is_that_of_the_written_checkpoint_in_independent_code(
    scheme: str, method: str, tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """Of a bfloat16 model, whatever dtype this machine computes in; test_logits.py has float32."""
    report = run(tiny_llama, tmp_path / "out", tiny_texts, scheme, method=method, evaluation=MANY)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), tiny_llama, SMALL, MANY)
    assert report.evaluation is not None
    assert report.evaluation.tokens == 128 * 63
    assert perplexity(tiny_llama, blocks.evaluation) == pytest.approx(
        report.evaluation.perplexity_original, rel=5e-3
    )
    assert perplexity(tmp_path / "out", blocks.evaluation) == pytest.approx(
        report.evaluation.perplexity_compressed, rel=5e-3
    )


def test_gptq_errs_less_than_rounding_on_the_text_it_learned_from(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    rounded = run(tiny_llama, tmp_path / "rtn", tiny_texts, method="rtn")
    solved = run(tiny_llama, tmp_path / "gptq", tiny_texts, method="gptq")
    assert rounded.modules[0].relative_error is not None
    assert solved.modules[0].relative_error is not None
    assert solved.modules[0].relative_error < 0.9 * rounded.modules[0].relative_error


def test_what_is_published_is_a_whole_checkpoint_and_nothing_else(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    (source / "README.md").write_text("the model's own card")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_bytes(b"\x00\xff")
    (source / "journal.jsonl").write_text("a file of the model's")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    out = tmp_path / "out"
    report = run(source, out, tiny_texts)
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    copied = {p.name for p in tiny_llama.iterdir()} - {"config.json", "model.safetensors"}
    copied |= {"extra/notes.txt", "journal.jsonl"}
    written = {"config.json", "model.safetensors.index.json", "README.md", "README.source.md", "recipe.yaml"}
    assert names == shards | copied | written | {"bitmill.json"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.source.md").read_text() == "the model's own card"
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["ignore"] == ["lm_head"]
    record = json.loads((out / "bitmill.json").read_text())
    assert record["report"]["work_key"] == report.work_key
    assert str(tmp_path) not in json.dumps(record)
    assert not (tmp_path / "out.partial").exists()
    assert report.totals.output_bytes == sum((out / name).stat().st_size for name in shards)


def test_tensors_that_are_not_compressed_are_the_source_s_byte_for_byte(
    tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", "qwen2", shards=2)
    run(source, tmp_path / "out", tiny_texts, "W8A8")
    original = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    written = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    kept = [name for name in original if not (name.endswith("_proj.weight"))]
    assert any(name.endswith("bias") for name in kept)
    for name in kept:
        assert torch.equal(written[name].view(torch.uint8), original[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4"])
def test_a_run_goes_on_where_it_was_cut_and_gives_the_same_bytes(
    scheme: str, tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", layers=4)
    whole = run(source, tmp_path / "whole", tiny_texts, scheme)

    def killed_at(layer: int) -> None:
        def on_event(event: Event) -> None:
            if isinstance(event, LayerSolved) and event.layer == layer:
                raise Killed

        with pytest.raises(Killed):
            run(source, tmp_path / "cut", tiny_texts, scheme, on_event=on_event)
        assert not (tmp_path / "cut").exists()

    killed_at(0)
    killed_at(2)
    events: list[Event] = []
    resumed = run(source, tmp_path / "cut", tiny_texts, scheme, on_event=events.append)
    assert [e.layer for e in events if isinstance(e, LayerReplayed)] == [0, 1, 2]
    assert [e.layer for e in events if isinstance(e, LayerSolved)] == [3]
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert len(resumed.modules) == 4 * 7
    assert resumed.evaluation == whole.evaluation
    assert not resumed.bytes_may_differ


def test_a_torn_journal_line_and_a_damaged_shard_count_as_never_written(
    tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", layers=3)
    run(source, tmp_path / "whole", tiny_texts)

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 1:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "cut", tiny_texts, on_event=stop)
    partial = tmp_path / "cut.partial"
    shard = partial / "model-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x01"[:1])
    with (partial / JOURNAL_FILE).open("a") as journal:
        journal.write('{"type": "layer", "layer": 2, "fil')
    events: list[Event] = []
    run(source, tmp_path / "cut", tiny_texts, on_event=events.append)
    assert [e.layer for e in events if isinstance(e, LayerReplayed)] == [1]
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_other_work_in_the_same_place_starts_over(tiny_llama: Path, tiny_texts: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved):
            raise Killed

    with pytest.raises(Killed):
        run(tiny_llama, tmp_path / "out", tiny_texts, "W4A16", on_event=stop)
    events: list[Event] = []
    run(tiny_llama, tmp_path / "out", tiny_texts, "W8A8", on_event=events.append)
    assert [e.code for e in events if isinstance(e, WarningRaised)] == ["started_over"]
    assert not [e for e in events if isinstance(e, LayerReplayed)]


def test_rounding_without_data_needs_no_forward_and_reports_no_output_error(
    tiny_llama: Path, tmp_path: Path
) -> None:
    report = run(tiny_llama, tmp_path / "out", None)
    assert report.evaluation is None
    assert report.data is None
    assert {module.relative_error for module in report.modules} == {None}
    assert report.phases.get("forward", 0) < 0.1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_oneshot_is_the_same_run_under_the_names_people_know(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tmp_path / "ours", tiny_texts, "W8A8", method="gptq")
    oneshot(
        model=str(tiny_llama),
        dataset=str(tiny_texts),
        recipe=[{"type": "GPTQModifier", "scheme": "W8A8", "targets": "Linear", "ignore": ["lm_head"]}],
        output_dir=str(tmp_path / "theirs"),
        max_seq_length=64,
        num_calibration_samples=8,
        evaluation=FEW,
    )
    assert digests(tmp_path / "ours") == digests(tmp_path / "theirs")


def test_nan_weights_are_named_and_nothing_is_published(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError) as caught:
        run(source, tmp_path / "out", tiny_texts)
    assert caught.value.code == "non_finite_weights"
    assert "layers.1.mlp.up_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_is_refused(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CompressionError) as caught:
        run(tiny_llama, tmp_path / "out", tiny_texts)
    assert caught.value.code == "output_exists"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_plan_that_does_not_fit_the_model_is_refused_before_compute(tiny_llama: Path) -> None:
    planned = plan(tiny_llama, Recipe.from_short("W4A16", has_dataset=False))
    model = StreamedModel(
        planned.checkpoint, planned.layers_prefix, device="cpu", compute_dtype=torch.float32
    )
    check_against_model(planned, model)
    layer = planned.layers[0]
    for modules in (
        layer.modules[1:],
        (replace(layer.modules[0], group="another"), *layer.modules[1:]),
        (replace(layer.modules[0], shape=(8, 8)), *layer.modules[1:]),
    ):
        wrong = replace(planned, layers=(replace(layer, modules=modules), *planned.layers[1:]))
        with pytest.raises(CompressionError) as caught:
            check_against_model(wrong, model)
        assert caught.value.code == "plan_mismatch"


def test_the_self_check_finds_one_wrong_number(tiny_llama: Path, tmp_path: Path) -> None:
    report = run(tiny_llama, tmp_path / "out", None)
    planned = plan(tiny_llama, Recipe.from_short("W4A16", has_dataset=False))
    check_files(planned, tmp_path / "out", report.modules)
    shard = tmp_path / "out" / planned.layers[1].shard
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.down_proj.weight_packed"][0, 0] ^= 1
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(CompressionError) as caught:
        check_files(planned, tmp_path / "out", report.modules)
    assert caught.value.code == "self_check_failed"
    assert "layers.1.mlp.down_proj" in str(caught.value)


def test_planning_never_imports_torch() -> None:
    code = "import sys, compression; compression.plan, compression.Recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("step", "stored", "served"),
    [
        ({"type": "rtn", "scheme": "W8A16"}, "in the compressed-tensors format; vLLM and Transformers", True),
        ({"type": "rtn", "scheme": "W3A16"}, "in the compressed-tensors format; Transformers loads", False),
        ({"type": "magnitude"}, "stored as the original's; vLLM and Transformers load", True),
    ],
)
def test_the_card_says_how_it_is_stored_and_who_reads_it(
    tiny_llama: Path, tmp_path: Path, step: dict[str, str], stored: str, served: bool
) -> None:
    compress(tiny_llama, Recipe.model_validate([step]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert stored in card
    assert ("vllm serve" in card, "from_pretrained(" in card) == (served, not served)
    assert ("vLLM's own kernels do not take 3-bit weights" in card) == (not served)
