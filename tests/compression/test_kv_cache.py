"""Keys and values in fp8: scales of what the compressed model caches, read back and simulated."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compression import Calibration, CompressionError, DatasetSpec, Evaluation, Recipe, compress
from compression.data.calibration import load_blocks
from compression.events import Event, LayerReplayed, LayerSolved
from compression.planning.planner import plan
from compression.report import Report
from compression.run.config import quantization_config
from tests.compression.fake_checkpoints import fake_llama
from tests.compression.plans import DATA, FEW, problem_of
from tests.support.models import tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
HELD_OUT = Evaluation(num_samples=4)
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def recipe(scheme: str = "W4A16", **fields: Any) -> Recipe:
    return Recipe.model_validate([{"type": "rtn", "scheme": scheme, "kv_cache_scheme": CACHE, **fields}])


def run(source: Path, output: Path, texts: Path, **options: Any) -> Report:
    dataset = DatasetSpec(path=str(texts))
    return compress(
        source, recipe(), output, dataset=dataset, calibration=SMALL, evaluation=HELD_OUT, **options
    )


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {}), ("gemma2", {}), ("phi3", {}), ("opt", {}), ("llama4_text", {"moe_layers": []})],
)
def test_reported_perplexity_is_that_of_the_checkpoint_with_its_cache_in_fp8(
    model_type: str, config: dict[str, Any], tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", model_type, dtype=torch.float32, **config)
    report = run(source, tmp_path / "out", tiny_texts)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, HELD_OUT).evaluation
    assert report.evaluation is not None
    with_cache = perplexity(tmp_path / "out", blocks)
    assert with_cache == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)
    assert perplexity(without_scheme(tmp_path), blocks) != pytest.approx(with_cache, rel=1e-6)


def without_scheme(tmp_path: Path) -> Path:
    """The same checkpoint, for readers that keep keys and values as they are."""
    plain = shutil.copytree(tmp_path / "out", tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def test_scales_are_of_the_largest_key_and_value_that_the_compressed_model_makes(
    tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", dtype=torch.float32)
    run(source, tmp_path / "out", tiny_texts)
    written = tensors_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(without_scheme(tmp_path), dtype=torch.float32)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, HELD_OUT).calibration
    with torch.no_grad():
        caches = [model(input_ids=block[None]).past_key_values for block in blocks]
    for layer in (0, 1):
        for kind, states in (("k", "keys"), ("v", "values")):
            scale = written[f"model.layers.{layer}.self_attn.{kind}_scale"]
            largest = max(float(getattr(cache.layers[layer], states).abs().max()) for cache in caches)
            assert scale.shape == (1,)
            assert float(scale) == pytest.approx(largest / 448, rel=1e-5)


def test_a_small_activation_budget_and_an_interruption_change_nothing(
    tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    whole = run(tiny_llama, tmp_path / "whole", tiny_texts)

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "cut", tiny_texts, on_event=stop, activation_budget_bytes=1)
    events: list[Event] = []
    resumed = run(tiny_llama, tmp_path / "cut", tiny_texts, on_event=events.append, activation_budget_bytes=1)
    assert [event.layer for event in events if isinstance(event, LayerReplayed)] == [0]
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert resumed.evaluation == whole.evaluation


def test_keys_beyond_the_dtype_of_their_scale_are_refused_by_name(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.self_attn") as caught:
        run(source, tmp_path / "out", tiny_texts)
    assert caught.value.code == "non_finite_activations"


class TestPlan:
    def test_scales_are_planned_with_each_layer_and_named_in_the_config(self, tmp_path: Path) -> None:
        folder = fake_llama(tmp_path / "model")
        with_cache = plan(folder, recipe(), dataset=DATA, calibration=FEW)
        assert with_cache.calibrates
        assert with_cache.layers[1].cache is not None
        assert sorted(with_cache.layers[1].cache.stored()) == [
            "model.layers.1.self_attn.k_scale",
            "model.layers.1.self_attn.v_scale",
        ]
        parsed = QuantizationConfig.model_validate(quantization_config(with_cache))
        assert parsed.kv_cache_scheme.num_bits == 8
        assert parsed.kv_cache_scheme.strategy == "tensor"

    def test_it_needs_data(self, tmp_path: Path) -> None:
        problem = problem_of(fake_llama(tmp_path / "model"), recipe())
        assert problem.code == "dataset_required"
        assert problem.pointer == "/recipe/steps/0/kv_cache_scheme"

    def test_one_step_says_it(self) -> None:
        steps = [{"type": "rtn", "scheme": name, "kv_cache_scheme": CACHE} for name in ("W8A8", "W4A16")]
        with pytest.raises(ValidationError, match="one step"):
            Recipe.model_validate(steps)

    @pytest.mark.parametrize("change", [{"num_bits": 4}, {"strategy": "channel"}, {"symmetric": False}])
    def test_what_vllm_does_not_take_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="kv_cache_scheme"):
            recipe(kv_cache_scheme={**CACHE, **change})
