"""What config.json says, and what is on disk against it, is taken as Transformers takes it.

The reference is the source, loaded whole by Transformers; where it refuses what the source says, the same
source without that.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.data.calibration import load_blocks
from compression.families.configuration import as_read
from compression.families.decoder import Decoder, read_decoder
from compression.families.families import FAMILIES
from compression.families.native_values import ACTIVATIONS, NEVER_NULL, ROPE_TYPES
from compression.report import Report
from tests.compression.streaming import empty, logits_of, planned, tokens
from tests.support.models import TOWERS, load_model, tiny_model
from tests.support.readers import perplexity

SMALL = Calibration(num_calibration_samples=4, max_seq_length=64)
FEW = Evaluation(num_samples=4)
ROTARY = [model_type for model_type, family in FAMILIES.items() if family.rope_types]

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"factor": 2.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    return no_gradients


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change config.json by hand."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = config.get("text_config", config)
    return text


def tie(folder: Path, tied: bool) -> Path:
    """The flag in every place where Transformers looks for it."""

    def flag(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = text_of(config)["tie_word_embeddings"] = tied

    return edit(folder, flag)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(source: Path, out: Path, texts: Path) -> Report:
    recipe = Recipe.from_short("FP8_DYNAMIC", method="rtn", has_dataset=True)
    dataset = DatasetSpec(path=str(texts))
    return compress(source, recipe, out, dataset=dataset, calibration=SMALL, evaluation=FEW)


def perplexities(report: Report) -> tuple[float, float]:
    assert report.evaluation is not None
    return report.evaluation.perplexity_original, report.evaluation.perplexity_compressed


def close(ours: Tensor, theirs: Tensor) -> bool:
    """But for the order of sums: Transformers multiplies experts together, and ours one by one."""
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lm_head_is_the_one_on_disk_whatever_the_flag_says(model_type: str, tmp_path: Path) -> None:
    untied = tie(tiny_model(tmp_path / "untied", model_type, dtype=torch.float32), False)
    source = tie(shutil.copytree(untied, tmp_path / "source"), True)
    batch = tokens(seq=16)
    (ours,) = logits_of(source, [batch])
    theirs = load_model(source, dtype=torch.float32)(input_ids=batch).logits
    assert close(ours, theirs)
    assert [warning.code for warning in planned(source).warnings] == ["tie_flag_contradicts_checkpoint"]
    assert planned(untied).warnings == ()

    change_tensors(source, lambda tensors: tensors.pop(head_of(tensors)))
    (embedded,) = logits_of(source, [batch])
    assert close(embedded, load_model(source, dtype=torch.float32)(input_ids=batch).logits)
    assert not close(embedded, ours)
    assert planned(source).warnings == ()
    tie(source, False)
    assert torch.equal(logits_of(source, [batch])[0], embedded)
    assert [warning.code for warning in planned(source).warnings] == ["tie_flag_contradicts_checkpoint"]


def head_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("lm_head.weight"))


@pytest.mark.parametrize("model_type", ["llama", "llava"])
@pytest.mark.parametrize(("head", "written"), [("other", False), ("embeddings", True), ("none", True)])
def test_the_output_says_of_lm_head_what_is_written(
    model_type: str, head: str, written: bool, tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", model_type, dtype=torch.float32)

    def change(tensors: dict[str, Tensor]) -> None:
        own = tensors.pop(head_of(tensors))
        embeddings = next(tensors[name] for name in tensors if name.endswith("embed_tokens.weight"))
        if head != "none":
            tensors["lm_head.weight"] = 4 * own if head == "other" else embeddings.clone()

    tie(change_tensors(source, change), head != "none")
    out = tmp_path / "out"
    report = run(source, out, tiny_texts)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is text_of(config)["tie_word_embeddings"] is written
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
    before, after = perplexities(report)
    assert perplexity(out, blocks) == pytest.approx(after, rel=1e-6)
    if head == "none":
        tie(source, True)  # Transformers would make up a head
    assert perplexity(source, blocks) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("model_type", ROTARY)
def test_every_kind_of_rotary_embedding_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Batches longer and shorter than the model was made for: each as if it were the model's first."""
    folder = tiny_model(
        tmp_path, model_type, dtype=torch.float32, tokenizer=False, max_position_embeddings=32
    )
    batches = [tokens(1, length, seed=length) for length in (24, 48, 32, 40, 24)]
    stated = json.loads((folder / "config.json").read_text())
    reached = load_model(folder).config.get_text_config()
    rotary = text_of(stated)["rope_parameters"]
    buffers = load_model(folder).named_buffers()
    frequencies = next(b for n, b in buffers if n.endswith("inv_freq") and "vis" not in n)
    assert reached.max_position_embeddings == 32
    different = []
    for kind in FAMILIES[model_type].rope_types:
        rope = {**ROPES[kind], "rope_type": kind}
        if kind == "longrope":
            count = len(frequencies)
            rope |= {"short_factor": [1.5] * count, "long_factor": [1.0 + i for i in range(count)]}
        layered = {key: part | rope for key, part in rotary.items() if isinstance(part, dict)}

        def change(config: dict[str, Any], new: dict[str, Any] = layered or rotary | rope) -> None:
            text_of(config)["rope_parameters"] = new

        edit(folder, change)
        reference = load_model(folder, dtype=torch.float32, experts_implementation="eager")
        ours = logits_of(folder, batches)
        for logits, batch in zip(ours, batches, strict=True):
            fresh = copy.deepcopy(reference)
            assert close(logits, fresh(input_ids=batch, use_cache=False).logits), (kind, batch.shape)
        different.append(ours[1])
    for index, logits in enumerate(different[1:], 1):
        assert not torch.equal(logits, different[0]), FAMILIES[model_type].rope_types[index]
    assert all(parameter.is_meta for parameter in empty(folder).module.parameters())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "opt", "qwen2_5_vl"])
def test_flags_about_what_a_forward_returns_change_nothing(
    model_type: str, tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", model_type, dtype=torch.float32)
    plain = run(source, tmp_path / "plain", tiny_texts)
    flags = {"return_dict": False, "output_hidden_states": True, "output_attentions": True}
    flags |= {"output_router_logits": True, "use_cache": False, "torchscript": True}

    def flag(config: dict[str, Any]) -> None:
        config |= flags
        text_of(config).update(flags)

    flagged = run(edit(source, flag), tmp_path / "flagged", tiny_texts)
    assert flagged.evaluation == plain.evaluation
    for shard in (tmp_path / "plain").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "flagged" / shard.name).read_bytes()


def configs_of(model_type: str, stated: dict[str, Any]) -> Any:
    """What the configuration class of Transformers makes of a decoder's keys."""
    stated = {"text_config": stated} if model_type in TOWERS else stated
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(stated)).get_text_config()


def test_nulls_that_transformers_refuses_are_known() -> None:
    refused = set()
    for model_type in FAMILIES:
        fields = [field.name for field in dataclasses.fields(configs_of(model_type, {}))]
        for name in (*fields, "partial_rotary_factor"):
            try:
                configs_of(model_type, {name: None})
            except Exception:  # each family has kinds of its own
                refused.add(name)
    apart = {"num_key_value_heads", "norm_topk_prob"}  # of another meaning, and in one family a value
    assert refused - apart <= NEVER_NULL
    of_models = {"first_k_dense_replace", "n_group", "topk_group", "v_head_dim"}
    assert NEVER_NULL - refused == of_models | {"rope_theta", "rope_local_base_freq"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_null_is_absent(model_type: str) -> None:
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 300, "ffn_dim": 96,
    }  # fmt: skip
    nulls = dict.fromkeys(NEVER_NULL - sizes.keys()) | {"pad_token_id": None, "num_key_value_heads": None}
    stated = {"model_type": model_type, "text_config": sizes | nulls}
    absent = sizes | {"pad_token_id": None, "num_key_value_heads": 4}
    if model_type not in TOWERS:
        stated |= stated.pop("text_config")
    resolved = as_read(stated, FAMILIES[model_type])
    kept = {key: value for key, value in text_of(resolved).items() if key != "model_type"}
    assert configs_of(model_type, kept).to_dict() == configs_of(model_type, absent).to_dict()
    decoder = read_decoder(stated)
    assert isinstance(decoder, Decoder)
    assert decoder.sizes["kv_heads"] == 4


@pytest.mark.parametrize(
    ("model_type", "nulls"),
    [
        ("qwen2", ("num_key_value_heads", "rope_parameters", "sliding_window")),
        ("mistral", ("num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings")),
        ("llava", ("num_key_value_heads", "mlp_bias", "max_position_embeddings", "rope_parameters")),
    ],
)
def test_a_config_with_nulls_runs_and_the_output_is_read(
    model_type: str, nulls: tuple[str, ...], tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", model_type, kv_heads=4, dtype=torch.float32, sliding_window=None)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
    before = perplexity(source, blocks)
    edit(source, lambda config: text_of(config).update(dict.fromkeys(nulls)))
    report = run(source, tmp_path / "out", tiny_texts)
    original, compressed = perplexities(report)
    assert original == pytest.approx(before, rel=1e-6)
    assert perplexity(tmp_path / "out", blocks) == pytest.approx(compressed, rel=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_the_plan_assumes_of_positions_padding_and_windows_is_in_transformers(model_type: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 300_000, "ffn_dim": 96, "num_key_value_heads": 4}
    config = configs_of(model_type, sizes)
    stated = {"text_config": sizes} if model_type in TOWERS else sizes
    decoder = read_decoder({"model_type": model_type, **stated})
    assert isinstance(decoder, Decoder)
    assert decoder.positions == config.max_position_embeddings
    assert decoder.window == (getattr(config, "sliding_window", None) or 0)
    assert FAMILIES[model_type].defaults.get("pad_token_id") == config.pad_token_id


def test_names_of_activations_and_of_rotary_embeddings_are_those_of_transformers() -> None:
    assert set(ACT2FN) == ACTIVATIONS
    assert {"default", *ROPE_INIT_FUNCTIONS} == ROPE_TYPES.keys()
    assert ROPES.keys() == ROPE_TYPES.keys()


@pytest.mark.parametrize(
    ("model_type", "former", "now"),
    [
        (model_type, former, now)
        for model_type, family in FAMILIES.items()
        for former, now in family.rope_aliases.items()
    ],
)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_former_names_of_rotary_embeddings_are_those_of_today(
    model_type: str, former: str, now: str, key: str, tiny_texts: Path, tmp_path: Path
) -> None:
    """As Phi-3-mini-128k was released first: Transformers 5.23 does not load it itself."""
    source = tiny_model(tmp_path / "model", model_type, dtype=torch.float32)
    blocks = load_blocks(DatasetSpec(path=str(tiny_texts)), source, SMALL, FEW).evaluation
    buffers = load_model(source).named_buffers()
    count = next(len(buffer) for name, buffer in buffers if name.endswith("inv_freq"))
    rope = {"short_factor": [1.0] * count, "long_factor": [1.0 + i for i in range(count)]}

    def name(kind: str) -> Callable[[dict[str, Any]], None]:
        def change(config: dict[str, Any]) -> None:
            config.pop("rope_parameters", None)
            config |= {"original_max_position_embeddings": 32, "rope_theta": 1e4}
            config["rope_scaling"] = {key: kind, **rope}

        return change

    before = perplexity(edit(source, name(now)), blocks)
    report = run(edit(source, name(former)), tmp_path / "out", tiny_texts)
    original, compressed = perplexities(report)
    assert original == pytest.approx(before, rel=1e-6)
    assert perplexity(tmp_path / "out", blocks) == pytest.approx(compressed, rel=1e-6)
