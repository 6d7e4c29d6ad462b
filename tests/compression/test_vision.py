"""Models that also read images: the decoder is compressed, everything else keeps its names and its bytes.

What they share with other decoders is tested with these: test_architectures.py, test_families.py,
test_batches.py, test_spill.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compression import Calibration, CompressionError, DatasetSpec, Evaluation, Recipe, compress
from compression.data.calibration import load_blocks
from compression.events import Event, LayerReplayed, LayerSolved
from compression.families.families import FAMILIES
from compression.model.streamed import StreamedModel
from compression.planning.planner import plan
from compression.report import Report
from compression.run.verify import check_against_model
from tests.compression.fake_checkpoints import LLAMA_3_8B, llama_shapes, write_config, write_fake
from tests.compression.plans import problem_of, recipe
from tests.compression.seed_models import qwen_2_5_vl_7b
from tests.support.models import TOWERS, load_model, tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)
GPTQ = [{"type": "gptq", "scheme": "W4A16"}]

OLD_NAMES = {"llava": ("language_model.model.", "language_model."), "qwen2_5_vl": ("model.", "")}
"""What stands in front of the decoder and in front of lm_head in checkpoints as of before Transformers 5."""


def run(source: Path, out: Path, texts: Path, steps: list[dict[str, Any]] = GPTQ, **options: Any) -> Report:
    dataset = DatasetSpec(path=str(texts))
    steps_ = Recipe.model_validate(steps)
    return compress(source, steps_, out, dataset=dataset, calibration=SMALL, evaluation=FEW, **options)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(shard).items()}


def rename(folder: Path, renamed: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint of one file other names."""
    tensors = {renamed(name): tensor for name, tensor in stored(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_transformers(model_type: str) -> Callable[[str], str]:
    """From the old names to those of the modules in Transformers 5, written down apart from the table."""
    decoder, head = OLD_NAMES[model_type]

    def renamed(name: str) -> str:
        if name == f"{head}lm_head.weight":
            return "lm_head.weight"
        if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.")):
            return f"model.{name}"
        return "model.language_model." + name.removeprefix(decoder)

    return renamed


@pytest.mark.parametrize("model_type", TOWERS)
def test_transformers_writes_the_old_names(model_type: str, tmp_path: Path) -> None:
    """Or the next test would compare the new ones with themselves."""
    decoder, head = OLD_NAMES[model_type]
    names = stored(tiny_model(tmp_path, model_type)).keys()
    assert {f"{decoder}layers.0.mlp.up_proj.weight", f"{head}lm_head.weight"} <= names
    assert any(name.startswith(("visual.", "vision_tower.")) for name in names)
    model = load_model(tmp_path)
    assert {in_transformers(model_type)(name) for name in names} == model.state_dict().keys()


@pytest.mark.parametrize("names", ["old", "new"])
@pytest.mark.parametrize("model_type", TOWERS)
def test_names_stay_and_both_kinds_are_read(
    model_type: str, names: str, tiny_texts: Path, tmp_path: Path
) -> None:
    """Two schemes, so that config.json names the modules of each."""
    source, out = tiny_model(tmp_path / "model", model_type, dtype=torch.float32), tmp_path / "out"
    if names == "new":
        rename(source, in_transformers(model_type))
    else:  # as they are published; Transformers 5 leaves out a part of LLaVA's
        rename(source, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))
    steps = [
        {"type": "gptq", "scheme": "W4A16", "targets": [r"re:.*mlp\..*"]},
        {"type": "rtn", "scheme": "FP8_DYNAMIC", "ignore": ["lm_head", r"re:.*layers\.1\.self_attn.*"]},
    ]
    report = run(source, out, tiny_texts, steps)
    before, after = stored(source), stored(out)
    decoder = "model.language_model." if names == "new" else OLD_NAMES[model_type][0]
    mlps = [f"layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")]
    linears = [decoder + name for name in (*mlps, *(f"layers.0.self_attn.{name}_proj" for name in "qkvo"))]
    assert len(report.modules) == len(linears)
    packed = {f"{name}.weight" for name in linears if "mlp" in name}
    assert before.keys() - after.keys() == packed
    for name in before.keys() - {f"{name}.weight" for name in linears}:
        assert torch.equal(after[name], before[name]), name
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [set(group["targets"]) for group in quantization["config_groups"].values()]
    modules = [f"model.language_model.{name.removeprefix(decoder)}" for name in linears]
    assert set.union(*targets) == set(modules)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
    assert report.evaluation is not None
    assert perplexity(out, blocks) == pytest.approx(report.evaluation.perplexity_compressed, rel=1e-6)
    tower = FAMILIES[model_type].vision.modules
    read, original = (dict(load_model(folder).named_parameters()) for folder in (out, source))
    beside = [name for name in original if name.startswith(tower)]
    assert len(beside) > 10
    assert all(torch.equal(read[name], original[name]) for name in beside)


@pytest.mark.parametrize("model_type", TOWERS)
def test_every_linear_but_the_decoders_is_in_ignore(
    model_type: str, tiny_texts: Path, tmp_path: Path
) -> None:
    """Under the name that Transformers looks for, and under the one on disk, which vLLM looks for."""
    source = tiny_model(tmp_path / "model", model_type)
    run(source, tmp_path / "out", tiny_texts)
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    model = load_model(source)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    beside = [name for name in linears if not name.startswith("model.language_model.")]
    assert len(beside) > 4
    assert set(beside) <= set(ignore)
    names = [key.removesuffix(".weight") for key in stored(source)]
    assert {name for name in names if in_transformers(model_type)(name) in beside} - {
        f"{OLD_NAMES[model_type][1]}lm_head"
    } <= set(ignore)
    assert not [name for name in ignore if ".layers.0.mlp" in name and "vision" not in name]


@pytest.mark.parametrize("model_type", TOWERS)
def test_the_tower_is_never_read(model_type: str, tiny_texts: Path, tmp_path: Path) -> None:
    """NaN in a weight that is read ends the job."""
    source = tiny_model(tmp_path / "model", model_type)
    tensors = stored(source)
    decoder, head = OLD_NAMES[model_type]
    tower = [name for name in tensors if not name.startswith((decoder, f"{head}lm_head"))]
    save_file(
        {name: t * float("nan") if name in tower else t for name, t in tensors.items()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    run(source, tmp_path / "out", tiny_texts)
    after = stored(tmp_path / "out")
    assert all(after[name].isnan().all() for name in tower)

    made = plan(source, recipe())
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    model.load_embeddings()
    model.load_head()
    real = {name for name, parameter in model.module.named_parameters() if not parameter.is_meta}
    text = "model.language_model."
    assert real == {f"{text}embed_tokens.weight", f"{text}norm.weight", "lm_head.weight"}


def test_processor_files_are_copied_byte_for_byte(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen2_5_vl")
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    for name in (*names, "chat_template.json"):
        (source / name).write_bytes(b'{ "a":1 }\r\n' + name.encode())
    run(source, tmp_path / "out", tiny_texts)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {**after, "quantization_config": None} == {**before, "quantization_config": None}


def test_an_interrupted_run_goes_on_behind_its_last_layer(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen2_5_vl", layers=3)
    steps = [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}]
    run(source, tmp_path / "whole", tiny_texts, steps)
    events: list[Event] = []

    class Killed(Exception): ...

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 1:
            raise Killed

    with pytest.raises(Killed):
        run(source, tmp_path / "cut", tiny_texts, steps, on_event=stop)
    run(source, tmp_path / "cut", tiny_texts, steps, on_event=events.append)
    assert [e.layer for e in events if isinstance(e, LayerReplayed)] == [0, 1]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_keys_without_a_text_config(tiny_texts: Path, tmp_path: Path) -> None:
    """As in Qwen/Qwen2.5-VL-7B-Instruct."""
    nested = tiny_model(tmp_path / "nested", "qwen2_5_vl")
    flat = Path(shutil.copytree(nested, tmp_path / "flat"))
    config = json.loads((flat / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key != "model_type"}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    text["rope_theta"] = 1e6
    (flat / "config.json").write_text(json.dumps({**text, **config}))
    reports = [run(folder, tmp_path / f"{folder.name} out", tiny_texts) for folder in (nested, flat)]
    assert reports[0].evaluation == reports[1].evaluation
    for path in (tmp_path / "nested out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "flat out" / path.name).read_bytes(), path.name


LLAVA_TEXT = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
"""text_config of llava-hf/llava-1.5-7b-hf: all other sizes are those that Transformers assumes."""


def llava(folder: Path, text: Mapping[str, Any] = LLAVA_TEXT, **extra: tuple[int, ...]) -> Path:
    """Header only, with the names of llava-hf/llava-1.5-7b-hf; a tower of one linear and its projector."""
    folder.mkdir()
    sizes = {**LLAMA_3_8B, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32064}
    shapes = {f"language_model.{name}": shape for name, shape in llama_shapes(sizes).items()}
    shapes |= {
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "multi_modal_projector.linear_1.weight": (4096, 1024),
        **extra,
    }
    write_fake(folder / "model.safetensors", shapes)
    parts = {"text_config": text, "vision_config": {"model_type": "clip_vision_model"}}
    write_config(folder, parts, model_type="llava", architectures=["LlavaForConditionalGeneration"])
    return folder


class TestPlan:
    def test_qwen_2_5_vl_7b(self, tmp_path: Path) -> None:
        made = plan(qwen_2_5_vl_7b(tmp_path / "model"), recipe())
        assert round(made.source_bytes / 1e9, 1) == 16.6
        assert round(made.tower_bytes / 1e9, 2) == 1.35
        assert made.to_dict()["tower_bytes"] == made.tower_bytes
        assert made.memory.host_bytes < 10e9
        assert made.warnings == made.unknown == ()
        assert made.ignore[0] == "lm_head"
        assert {f"{name}.blocks.31.mlp.up_proj" for name in ("visual", "model.visual")} <= set(made.ignore)
        assert len(made.ignore) == 1 + 2 * (32 * 5 + 2)
        assert made.layers[27].modules[0].name == "model.language_model.layers.27.self_attn.q_proj"
        assert made.layers[27].prefix_on_disk == "model.layers.27."

    def test_its_names_and_shapes_are_those_of_transformers(self, tmp_path: Path) -> None:
        made = plan(qwen_2_5_vl_7b(tmp_path / "model"), recipe())
        model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.bfloat16)
        check_against_model(made, model)
        assert model.tower().keys() == set(made.tower)

    def test_the_tower_costs_no_memory(self, tmp_path: Path) -> None:
        small = plan(llava(tmp_path / "small"), recipe())
        extra = {"vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": (100_000, 100_000)}
        large = plan(llava(tmp_path / "large", **extra), recipe())
        assert large.tower_bytes == small.tower_bytes + 2 * 10**10
        assert large.output_bytes > small.output_bytes + 2 * 10**10
        assert large.memory == small.memory

    def test_sizes_that_text_config_leaves_out(self, tmp_path: Path) -> None:
        made = plan(llava(tmp_path / "model"), recipe())
        assert made.layers[31].modules[4].shape == (11008, 4096)
        assert set(made.ignore) == {
            "lm_head",
            "model.vision_tower.encoder.layers.0.mlp.fc1",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.multi_modal_projector.linear_1",
            "multi_modal_projector.linear_1",
        }

    def test_patterns_for_the_tower_mean_it_under_each_of_its_names(self, tmp_path: Path) -> None:
        """LLM Compressor's examples ignore what is left alone anyway."""
        qwen, llava_ = qwen_2_5_vl_7b(tmp_path / "qwen"), llava(tmp_path / "llava")
        plan(qwen, recipe(ignore=["re:.*lm_head", "re:visual.*", "re:model.visual.*"]))
        patterns = ["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"]
        plan(llava_, recipe(ignore=patterns))
        assert problem_of(qwen, recipe(targets=["re:.*visual.*"])).code == "pattern_matches_nothing"

    def test_a_decoder_of_another_family_is_refused(self, tmp_path: Path) -> None:
        folder = llava(tmp_path / "model", {**LLAVA_TEXT, "model_type": "mistral"})
        assert problem_of(folder).code == "unsupported_architecture"

    def test_a_checkpoint_without_its_tower_is_refused(self, tmp_path: Path) -> None:
        folder = qwen_2_5_vl_7b(tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        shapes = llama_shapes(config)
        for index in range(config["num_hidden_layers"]):
            for name, rows in (("q", 3584), ("k", 512), ("v", 512)):
                shapes[f"model.layers.{index}.self_attn.{name}_proj.bias"] = (rows,)
        write_fake(folder / "model.safetensors", shapes)
        problem = problem_of(folder)
        assert problem.code == "checkpoint_incomplete"
        assert "model.visual" in problem.message

    def test_two_names_of_one_tensor(self, tmp_path: Path) -> None:
        folder = llava(tmp_path / "model", **{"model.multi_modal_projector.linear_1.weight": (4096, 1024)})
        assert problem_of(folder).code == "index_invalid"


def test_a_tower_that_lacks_a_tensor_is_refused_before_compute(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen2_5_vl")
    tensors = stored(source)
    del tensors["visual.merger.mlp.0.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"model\.visual\.merger\.mlp\.0\.bias is not there") as caught:
        run(source, tmp_path / "out", tiny_texts)
    assert caught.value.code == "plan_mismatch"


def test_a_tokenizer_with_more_tokens_than_text_config_has(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "llava", vocab=200)
    with pytest.raises(CompressionError) as caught:
        run(source, tmp_path / "out", tiny_texts)
    assert caught.value.code == "tokenizer_mismatch"


def test_the_table_and_the_tests_know_the_same_towers() -> None:
    assert TOWERS.keys() == {model_type for model_type, family in FAMILIES.items() if family.vision.modules}
