"""Experts: each is solved for its own tokens, starved ones too, and nothing else of the model changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from compression import DatasetSpec, Evaluation, Recipe, plan
from compression.errors import PlanError
from compression.events import Event, LayerSolved
from compression.families.families import FAMILIES
from compression.families.structure import ExpertsSpec, GroupSpec
from compression.math.gram import Gram, fill_up
from compression.model.batches import ExpertsInputs, SuspendedBatches
from compression.model.expert_grams import ExpertGrams
from compression.model.experts import Experts, Routed, unfuse
from compression.model.hooks import ForwardHooks
from compression.model.streamed import StreamedModel
from compression.planning.memory import ParkedTokens, expert_gram_bytes
from tests.compression.expert_runs import GPTQ, SMALL, run
from tests.compression.plans import codes, problems_of
from tests.support.models import tiny_model

TOKENS = ParkedTokens(calibration=256, evaluation=256, block=64)
Steps = list[dict[str, Any]]
BLOCK = "model.layers.0.block_sparse_moe.experts"
pytestmark = pytest.mark.usefixtures("no_gradients")


def tiny_mixtral(folder: Path, **config: Any) -> Path:
    """32 columns, so that most experts see more tokens than that; 4 experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4}
    heads = {"heads": 2, "head_dim": 16, "kv_heads": 1}
    return tiny_model(folder, "mixtral", dtype=torch.float32, **heads, **sizes, **config)


def prefer_two_experts(folder: Path) -> Path:
    """Make the router of layer 0 choose between experts 0 and 1 only, whatever the token."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[1] = -gate[0]
    gate[2:] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def same_bytes(one: Path, other: Path) -> bool:
    shards = sorted(path.name for path in one.glob("*.safetensors"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in shards)


def taken_apart(act: str, dtype: torch.dtype, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """What five experts make of forty tokens: fused, by Transformers' own eager code, and taken apart.

    act: between their linears. draw: size -> weights, tokens and routing weights.
    """
    config = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=48,
        num_experts=5,
        num_attention_heads=2,
        head_dim=16,
        hidden_act=act,
    )
    config._experts_implementation = "eager"
    layer = Qwen3MoeDecoderLayer(config, 0).to(dtype).eval()
    fused = layer.mlp.experts
    for parameter in fused.parameters():
        parameter.copy_(draw(*parameter.shape))
    x, weights = draw(40, 32).to(dtype), draw(40, 2).to(dtype)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(40)])  # the last expert gets nothing
    expected = fused(x, chosen, weights)
    unfuse(layer, ExpertsSpec("mlp.experts", "mlp.gate"))
    for number, expert in enumerate(layer.mlp.experts):
        gate, up = fused.gate_up_proj[number].chunk(2)
        expert.gate_proj.weight.copy_(gate)
        expert.up_proj.weight.copy_(up)
        expert.down_proj.weight.copy_(fused.down_proj[number])
    return layer.mlp.experts(x, chosen, weights), expected


def test_taken_apart_they_compute_what_transformers_computes() -> None:
    """Bit for bit where products are exact, on small whole numbers, whatever code a processor chooses for a
    matrix of this size; to rounding otherwise."""
    torch.manual_seed(0)
    ours, theirs = taken_apart("relu", torch.float32, lambda *size: torch.randint(-2, 3, size).float())
    assert theirs.abs().max() > 100
    assert torch.equal(ours, theirs)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        ours, theirs = taken_apart("silu", dtype, lambda *size: torch.randn(size) / 4)
        assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def test_a_layout_that_is_not_known_is_a_plan_mismatch() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=2, num_attention_heads=2)
    with torch.device("meta"):
        layer = GptOssDecoderLayer(config, 0)
    with pytest.raises(PlanError) as caught:
        unfuse(layer, ExpertsSpec("mlp.experts", "mlp.router"))
    assert caught.value.code == "plan_mismatch"


def parked_before_experts(folder: Path) -> tuple[Experts, list[Routed]]:
    """Two batches of layer 0, before its experts."""
    made = plan(folder, Recipe.from_short("W4A16", method="rtn", has_dataset=False, group_size=32))
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    model.load_embeddings()
    modules = made.layers[0].modules
    experts = {m.group: m.experts for m in modules if m.experts}
    hooks = ForwardHooks(model, {m.name: m.group for m in modules}, {}, experts=experts)
    stream = SuspendedBatches(hooks, [tokens(0), tokens(1)], quantize_activations=False)
    model.load_layer(0)
    inputs = next(group for group in stream.groups(0) if isinstance(group, ExpertsInputs))
    module = model.module.get_submodule(BLOCK)
    assert isinstance(module, Experts)
    return module, list(inputs.inputs)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_each_expert_has_the_gram_of_its_own_tokens(at_once: int, tmp_path: Path) -> None:
    """Against what Transformers' router chooses, in float64; starved experts are filled up by the formula."""
    folder = tiny_mixtral(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    fused = whole.model.layers[0].mlp.experts
    fused.register_forward_pre_hook(lambda _module, args: seen.append((args[0].double(), args[1])))
    for seed in (0, 1):
        whole(input_ids=tokens(seed), use_cache=False)
    everyone = torch.cat([x for x, _ in seen])

    def through(expert: int, x: Tensor) -> Tensor:
        gate, up = (x @ fused.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    module, inputs = parked_before_experts(folder)
    grams = ExpertGrams(module, inputs, at_once)
    starved = set()
    for stage, columns in (("gate_up", 32), ("down", 64)):
        for expert in range(4):
            own = torch.cat([x[(chosen == expert).any(-1)] for x, chosen in seen])
            count, missing = len(own), max(columns - len(own), 0)
            x, y = own, everyone
            if stage == "down":
                x, y = through(expert, x), through(expert, y)
            expected = x.T @ x + missing / len(y) * (y.T @ y)
            gram = grams.gram(stage, expert)
            assert (gram.tokens, gram.borrowed) == (count + missing, missing)
            torch.testing.assert_close(gram.matrix.double(), expected, rtol=1e-4, atol=1e-4)
            starved |= {missing > 0}
    assert starved == {True, False}


def test_filling_up_goes_from_the_experts_own_gram_to_that_of_all() -> None:
    own, everyone = Gram(torch.eye(4) * 6, 6), Gram(torch.ones(4, 4) + torch.eye(4), 10)
    assert torch.equal(fill_up(own, everyone).matrix, own.matrix)
    nothing = fill_up(None, everyone)
    torch.testing.assert_close(nothing.matrix, 0.4 * everyone.matrix)
    assert (nothing.tokens, nothing.borrowed) == (4, 4)


def test_experts_without_tokens_are_solved_and_reported(tiny_texts: Path, tmp_path: Path) -> None:
    source = prefer_two_experts(tiny_mixtral(tmp_path / "model", num_experts_per_tok=1))
    report = run(source, tmp_path / "out", tiny_texts)
    rows = {row.name: row for row in report.modules}
    counts = [rows[f"{BLOCK}.{expert}.w1"].tokens for expert in range(4)]
    assert counts[2:] == [0, 0]
    assert sum(count or 0 for count in counts) == 4 * 64
    assert rows["model.layers.0.self_attn.q_proj"].tokens is None
    for expert in (2, 3):
        error = rows[f"{BLOCK}.{expert}.w2"].relative_error
        assert error is not None
        assert 0 < error < 0.05
    shown = json.loads((tmp_path / "out" / "bitmill.json").read_text())["report"]["modules"]
    assert [row["tokens"] for row in shown if row["name"].endswith("0.block_sparse_moe.experts.2.w3")] == [0]
    assert "of 24 expert modules saw fewer" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("steps", "at_once"), [(GPTQ, 3), ([{"type": "rtn", "scheme": "W8A8", "observer": "mse"}], 2)]
)
def test_on_disk_and_in_memory_give_the_same_bytes(
    steps: Any, at_once: int, tiny_texts: Path, tmp_path: Path
) -> None:
    source = tiny_mixtral(tmp_path / "model")
    in_memory = run(source, tmp_path / "memory", tiny_texts, steps)
    budget = at_once * expert_gram_bytes(64, TOKENS)
    on_disk = run(source, tmp_path / "disk", tiny_texts, steps, activation_budget_bytes=budget)
    records = [json.loads((tmp_path / where / "bitmill.json").read_text()) for where in ("memory", "disk")]
    assert [record["plan"]["experts_at_once"] for record in records] == [1, at_once]
    assert on_disk.modules == in_memory.modules
    assert same_bytes(tmp_path / "memory", tmp_path / "disk")


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_mixtral(tmp_path / "model")
    whole = run(source, tmp_path / "whole", tiny_texts)

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", tiny_texts, on_event=stop)
    assert run(source, tmp_path / "cut", tiny_texts).modules == whole.modules
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_pruned_and_quantized_experts_read_back(tiny_texts: Path, tmp_path: Path) -> None:
    """The self-check of the run reads every expert; half of each is zero, and a packed row is as planned."""
    source = tiny_mixtral(tmp_path / "model")
    pruned = {"type": "sparsegpt", "mask_structure": "2:4"}
    report = run(source, tmp_path / "out", tiny_texts, [pruned, *GPTQ])
    assert all(0.5 <= (row.sparsity or 0) < 0.6 for row in report.modules if ".experts." in row.name)


def test_smoothing_leaves_the_norm_that_the_router_reads(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen3_moe")
    steps = [{"type": "smoothquant"}, {"type": "gptq", "scheme": "W8A8"}]
    made = plan(source, Recipe.model_validate(steps), dataset=DatasetSpec(texts=("some text",)))
    sparse, dense = ({fold.norm for fold in layer.folds.values()} for layer in made.layers)
    assert sparse == {"model.layers.0.input_layernorm"}
    assert dense == {"model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"}
    assert "experts_not_smoothed" in codes(list(made.warnings))


def test_experts_of_one_layer_are_treated_alike(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen3_moe")
    steps = [{"type": "rtn", "scheme": "W4A16", "ignore": ["lm_head", r"re:.*experts\.1\."]}]
    problems = problems_of(source, Recipe.model_validate(steps))
    assert codes(problems) == ["fused_group_mismatch"]


def test_layers_that_the_model_does_not_run_are_copied_and_ignored(tiny_texts: Path, tmp_path: Path) -> None:
    """DeepSeek's checkpoints end with a layer that predicts further tokens."""
    source = tiny_model(tmp_path / "model", "deepseek_v3", dtype=torch.float32)
    shapes = {"eh_proj": (128, 256), "mlp.experts.0.up_proj": (128, 128), "enorm": (128,)}
    extra = {f"model.layers.2.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    run(source, tmp_path / "out", tiny_texts, [{"type": "rtn", "scheme": "FP8_DYNAMIC"}])
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore[-2:] == ["model.layers.2.eh_proj", "model.layers.2.mlp.experts.0.up_proj"]
    written: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(shard)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    for name, tensor in {**extra, bias: tensors[bias]}.items():
        assert torch.equal(written[name], tensor)


def test_the_estimate_knows_layers_with_experts(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen3_moe", mlp_only_layers=[])
    made = plan(
        source,
        Recipe.from_short("W4A16", has_dataset=True),
        dataset=DatasetSpec(texts=("some text",)),
        calibration=SMALL,
        evaluation=Evaluation(enabled=False),
    )
    items = {item.name: item.bytes for item in made.memory.items}
    attention = 2 * 256 * 128 + 2 * 128 * 128
    experts = 3 * 3 * 128 * 128
    others = 3 * 128 + 2 * 128 + 2 * 64
    assert items["layer"] == 4 * (attention + experts + others)
    groups = {group.name: group.rows for group in made.workload.groups if group.expert}
    assert groups == {"mlp.experts.*.gate_proj": 2 * 128, "mlp.experts.*.down_proj": 128}
    assert set(made.workload.groups.values()) == {2, 2 * 3}
    assert items["experts' Gram matrices"] == expert_gram_bytes(128, TOKENS) + 4 * 128**2


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_experts", 10**9), ("mlp_only_layers", "all"), ("decoder_sparse_step", 0), ("num_experts", "many")],
)
def test_a_config_that_says_nonsense_about_experts_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "model", "qwen3_moe", layers=1, tokenizer=False, mlp_only_layers=[])
    config = json.loads((source / "config.json").read_text())
    config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps({**config, "num_experts": 4, key: value}))
    assert codes(problems_of(source)) == ["config_invalid"]


def test_many_layers_of_many_experts_are_not_looked_for(tmp_path: Path) -> None:
    """A config of few bytes must not make planning look for millions of tensors."""
    source = tiny_model(tmp_path / "model", "mixtral", layers=1, tokenizer=False)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 10**6, "num_local_experts": 1000}
    (source / "config.json").write_text(json.dumps(config))
    assert codes(problems_of(source))[0] == "checkpoint_incomplete"


def test_families_with_experts_know_where_they_are() -> None:
    for family in FAMILIES.values():
        if sparse := family.sparse:
            groups = [group for group in sparse.groups if isinstance(group, GroupSpec)]
            gates = {linear.name for group in groups for linear in group.linears if linear.gate}
            router = sparse.experts.router
            assert f"{router}.weight" in sparse.others or router in gates
