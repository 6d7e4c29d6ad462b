"""Runs on a CUDA device, a pretended one: the CPU's bytes, on the card that was asked for, with few waits.

Models are float32, which is computed alike on both; in bfloat16 a GPU sums Gram matrices more precisely.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress, plan
from compression.events import JOURNAL_FILE, Event, LayerReplayed, LayerSolved
from compression.model.experts import Routed
from compression.planning.memory import CUDA_CONTEXT_BYTES, estimate
from compression.report import Report
from compression.schemes import SCHEMES
from tests.support.fake_gpu import Counts, FakeGpu
from tests.support.models import load_model, tiny_model, tiny_tokenizer

Steps = list[dict[str, Any]]
SMALL = Calibration(num_calibration_samples=2, max_seq_length=64)
FEW = Evaluation(num_samples=2)
GPTQ: Steps = [{"type": "gptq", "scheme": "W4A16"}]
METHODS: dict[str, Steps] = {
    "awq, gptq": [{"type": "awq", "n_grid": 1}, {"type": "gptq", "scheme": "W4A16", "observer": "gram"}],
    "smoothquant, gptq": [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8", "observer": "mse"}],
    "keys and values": [
        {"type": "rtn", "scheme": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    ],
    "sparsegpt, gptq": [{"type": "sparsegpt", "mask_structure": "2:4"}, *GPTQ],
    "wanda": [{"type": "wanda", "mask_structure": "2:4"}, {"type": "rtn", "scheme": "W8A8"}],
    "wanda by row": [{"type": "wanda"}],
    "magnitude": [{"type": "magnitude", "mask_structure": "2:4"}],
    "magnitude of all": [{"type": "magnitude"}],
}


@pytest.fixture(autouse=True)
def _triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is beside a torch with CUDA: what compressed-tensors would do with it, shows, since it is not."""
    monkeypatch.setattr("compressed_tensors.utils.triton.HAS_TRITON", True)


def small_llama(folder: Path, **sizes: Any) -> Path:
    settings = {"layers": 1, "hidden": 128, "intermediate": 128, "heads": 2, "kv_heads": 1, **sizes}
    return tiny_model(folder, **{"dtype": torch.float32, **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("two_layers"), layers=2)


def run(source: Path, output: Path, data: Path | str, steps: Steps = GPTQ, **options: Any) -> Report:
    dataset = DatasetSpec.model_validate(data if data == "self" else {"path": str(data)})
    settings = {"calibration": SMALL, "evaluation": FEW, **options}
    return compress(source, Recipe.model_validate(steps), output, dataset=dataset, **settings)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def same_on_both(source: Path, folder: Path, data: Path | str, steps: Steps, **options: Any) -> FakeGpu:
    """Run on the CPU and on the pretended GPU, and hold every byte and every figure of the two together."""
    on_cpu = run(source, folder / "cpu", data, steps, device="cpu", **options)
    with FakeGpu() as gpu:
        on_gpu = run(source, folder / "gpu", data, steps, device="cuda:0", **options)
    assert shards(folder / "gpu") == shards(folder / "cpu")
    assert on_gpu.modules == on_cpu.modules
    assert on_gpu.evaluation == on_cpu.evaluation
    assert on_gpu.work_key == on_cpu.work_key
    assert gpu.launches.total() > 100
    return gpu


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, llama: Path, tiny_texts: Path, tmp_path: Path) -> None:
    steps: Steps = [
        {"type": "gptq", "scheme": scheme, "targets": [r"re:.*self_attn\..*"]},
        {"type": "rtn", "scheme": scheme, "targets": [r"re:.*mlp\..*"]},
    ]
    same_on_both(llama, tmp_path, tiny_texts, steps)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, llama: Path, tiny_texts: Path, tmp_path: Path) -> None:
    same_on_both(llama, tmp_path, tiny_texts, METHODS[method])


def test_hidden_states_on_disk(two_layers: Path, tiny_texts: Path, tmp_path: Path) -> None:
    steps: Steps = [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}]
    gpu = same_on_both(two_layers, tmp_path, tiny_texts, steps, activation_budget_bytes=1)
    assert any("spill.py" in event.line for event in gpu.syncs)
    assert any("spill.py" in event.line for event in gpu.copies)


def test_the_clock_waits_as_often_for_many_batches_on_disk_as_for_few(llama: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"  # each of another length, and so a batch of its own
    texts.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in (20, 30, 40)))
    waits = []
    for samples in (1, 3):
        calibration = Calibration(num_calibration_samples=samples, max_seq_length=64, packing=False)
        options = {"calibration": calibration, "evaluation": Evaluation(enabled=False)}
        with FakeGpu() as gpu:
            output = tmp_path / str(samples)
            run(llama, output, texts, device="cuda:0", activation_budget_bytes=1, **options)
        waits.append(sum(count for event, count in gpu.syncs.items() if "clock.py" in event.line))
        assert any("spill.py" in event.line for event in gpu.copies)
    assert waits[0] == waits[1] > 0


@pytest.mark.parametrize(("model_type", "budget"), [("qwen3_moe", 1 << 30), ("llama4_text", 1)])
def test_experts(model_type: str, budget: int, tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", model_type, layers=1, dtype=torch.float32, mlp_only_layers=[])
    steps: Steps = [{"type": "gptq", "scheme": "W4A16", "group_size": 32}]
    gpu = same_on_both(source, tmp_path, tiny_texts, steps, activation_budget_bytes=budget)
    sorts = sum(
        n for each, n in gpu.launches.items() if each.operation == "sort" and "experts.py" in each.line
    )
    assert sorts == (3 if budget > 1 else 11)  # a batch in each role, once; on disk, at every rehearsal


def test_the_tokens_of_all_experts_cost_one_wait() -> None:
    """However many there are. Number 4 is none of the four: its token is nobody's."""
    chosen = torch.tensor([[0, 2], [4, 2], [3, 0], [2, 3]])
    with FakeGpu() as gpu, torch.no_grad():
        routed = Routed(torch.ones(4, 8).to("cuda:0"), chosen.to("cuda:0"), 4)
        found = [routed.tokens_of(expert) for expert in range(4)]
        assert gpu.counts().syncs == 1
        on_host = [(place.tolist(), token.tolist()) for place, token in found]
    for expert, (place, token) in enumerate(on_host):
        expected = torch.where(chosen.t() == expert)
        assert (place, token) == (expected[0].tolist(), expected[1].tolist())


def test_positions_that_a_model_counts_itself(tiny_texts: Path, tmp_path: Path) -> None:
    """OPT does so by a cumsum of floating point, which CUDA refuses where kernels are to be deterministic."""
    source = tiny_model(tmp_path / "model", "opt", layers=1, dtype=torch.float32)
    same_on_both(source, tmp_path, tiny_texts, [{"type": "rtn", "scheme": "W8A8", "observer": "minmax"}])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_that_depend_on_the_length(
    rope: dict[str, Any], tiny_texts: Path, tmp_path: Path
) -> None:
    source = small_llama(
        tmp_path / "model", max_position_embeddings=32, rope_parameters={**rope, "rope_theta": 1e4}
    )
    same_on_both(source, tmp_path, tiny_texts, [{"type": "rtn", "scheme": "W8A8", "observer": "minmax"}])


def test_text_that_the_model_writes(llama: Path, tmp_path: Path) -> None:
    gpu = same_on_both(llama, tmp_path, "self", GPTQ)
    assert any("generate.py" in event.line for event in gpu.syncs)


def test_bfloat16_is_computed_as_such(tiny_texts: Path, tmp_path: Path) -> None:
    """With Gram matrices that are sums of exact products: errors are those of the same model in float32."""
    source = small_llama(tmp_path / "model", dtype=torch.bfloat16)
    wide = tmp_path / "wide"
    load_model(source, dtype=torch.float32).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    expected = run(wide, tmp_path / "cpu", tiny_texts, device="cpu")
    with FakeGpu():
        report = run(source, tmp_path / "gpu", tiny_texts, device="cuda:0")
    resolved = json.loads((tmp_path / "gpu" / "bitmill.json").read_text())["provenance"]["resolved"]
    assert resolved["arithmetic"]["compute_dtype"] == "bfloat16"
    assert resolved["arithmetic"]["device"] == "cuda"
    assert report.evaluation is not None
    assert expected.evaluation is not None
    perplexity = expected.evaluation.perplexity_original
    assert report.evaluation.perplexity_original == pytest.approx(perplexity, rel=0.02)
    for one, other in zip(report.modules, expected.modules, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.1)


def killed_behind_layer_0(event: Event) -> None:
    if isinstance(event, LayerSolved):
        raise KeyboardInterrupt


def test_a_run_goes_on_where_the_worker_says_and_gives_the_same_bytes(
    two_layers: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """The first attempt had cuda:0; the next one is told cuda:1, and takes it."""
    steps: Steps = [
        {"type": "smoothquant"},
        {"type": "gptq", "scheme": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ]
    with FakeGpu(2):
        whole = run(two_layers, tmp_path / "whole", tiny_texts, steps, device="cuda:0")
        with pytest.raises(KeyboardInterrupt):
            run(
                two_layers, tmp_path / "cut", tiny_texts, steps, device="cuda",
                on_event=killed_behind_layer_0,
            )  # fmt: skip
    events: list[Event] = []
    with FakeGpu(2) as gpu:
        report = run(two_layers, tmp_path / "cut", tiny_texts, steps, device="cuda:1", on_event=events.append)
        assert torch.cuda.current_device() == 1
    assert gpu.used == {torch.device("cuda:1")}
    assert [event.layer for event in events if isinstance(event, LayerReplayed)] == [0]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert report.evaluation == whole.evaluation
    assert report.fingerprint == whole.fingerprint
    assert not report.bytes_may_differ


def test_a_plan_of_before_is_read(two_layers: Path, tiny_texts: Path, tmp_path: Path) -> None:
    """Databases hold plans that name a card, and a GPU by its architecture: nobody knows which it was."""
    with FakeGpu(2):
        with pytest.raises(KeyboardInterrupt):
            run(two_layers, tmp_path / "cut", tiny_texts, device="cuda:0", on_event=killed_behind_layer_0)
        journal = tmp_path / "cut.partial" / JOURNAL_FILE
        header, *layers = journal.read_text().splitlines()
        old = json.loads(header)
        old["resolved"]["arithmetic"] |= {"device": "cuda:0", "capability": "sm_90"}
        journal.write_text("\n".join([json.dumps(old), *layers]) + "\n")
        events: list[Event] = []
        report = run(two_layers, tmp_path / "cut", tiny_texts, device="cuda:1", on_event=events.append)
    assert [event.layer for event in events if isinstance(event, LayerReplayed)] == [0]
    assert report.bytes_may_differ


def test_another_card_may_give_other_bytes(two_layers: Path, tiny_texts: Path, tmp_path: Path) -> None:
    """An H100 on PCIe and one on SXM have one architecture, and different numbers of multiprocessors."""
    with FakeGpu(multiprocessors=114), pytest.raises(KeyboardInterrupt):
        run(two_layers, tmp_path / "cut", tiny_texts, device="cuda:0", on_event=killed_behind_layer_0)
    with FakeGpu(multiprocessors=132):
        report = run(two_layers, tmp_path / "cut", tiny_texts, device="cuda:0")
    assert report.bytes_may_differ


def test_the_peak_is_this_run_s_and_within_the_estimate(
    llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    larger = small_llama(tmp_path / "model", hidden=256, intermediate=512, layers=1)
    with FakeGpu():
        first = run(larger, tmp_path / "larger", tiny_texts, device="cuda:0")
        second = run(llama, tmp_path / "small", tiny_texts, device="cuda:0")
    assert 0 < second.peak_gpu_bytes < 0.5 * first.peak_gpu_bytes
    dataset = DatasetSpec(path=str(tiny_texts))
    made = plan(larger, Recipe.model_validate(GPTQ), dataset=dataset, calibration=SMALL, evaluation=FEW)
    assert first.peak_gpu_bytes < estimate(made.workload).gpu_bytes - CUDA_CONTEXT_BYTES


AWQ: Steps = [{"type": "awq", "scheme": "W4A16_ASYM", "n_grid": 2, "duo_scaling": "both"}]
LIMITS: dict[str, tuple[Steps, Counts]] = {
    "gptq": (GPTQ, Counts(launches=5_000, syncs=75, copies=9)),
    "rtn": ([{"type": "rtn", "scheme": "FP8_DYNAMIC"}], Counts(launches=2_400, syncs=48, copies=9)),
    "nvfp4": ([{"type": "rtn", "scheme": "NVFP4"}], Counts(launches=1_800, syncs=66, copies=16)),
    "awq": (AWQ, Counts(launches=14_800, syncs=86, copies=9)),
    "sparsegpt": ([{"type": "sparsegpt"}], Counts(launches=1_900, syncs=60, copies=9)),
}
"""What a layer of seven linears may cost: launches, waits (the clock's aside), copies to the device."""


@pytest.mark.parametrize("name", LIMITS)
def test_a_layer_waits_for_the_device_a_bounded_number_of_times(
    name: str, two_layers: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """The second layer's, so that what is done once does not count. Smaller limits are welcome."""
    steps, limit = LIMITS[name]
    run(two_layers, tmp_path / "cpu", tiny_texts, steps, device="cpu")
    layers: list[Counts] = []
    with FakeGpu() as gpu:

        def on_event(event: Event) -> None:
            if isinstance(event, LayerSolved):
                clock = sum(count for each, count in gpu.syncs.items() if "clock.py" in each.line)
                layers.append(gpu.counts() - Counts(syncs=clock))

        run(two_layers, tmp_path / "gpu", tiny_texts, steps, device="cuda:0", on_event=on_event)
    assert shards(tmp_path / "gpu") == shards(tmp_path / "cpu")
    cost = layers[1] - layers[0]
    assert cost.syncs <= limit.syncs, gpu.syncs.most_common()
    assert cost.copies <= limit.copies, gpu.copies.most_common()
    assert cost.launches <= limit.launches, gpu.launches.most_common(30)
