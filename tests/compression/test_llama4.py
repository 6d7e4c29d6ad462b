"""Llama 4: experts that lie stacked on disk, and that read tokens times the router's score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextDecoderLayer

from compression import DatasetSpec, Recipe, plan
from compression.checkpoint.reader import read_tensors
from compression.errors import PlanError
from compression.events import Event, LayerSolved
from compression.families.families import FAMILIES
from compression.model.batches import ExpertsInputs, SuspendedBatches
from compression.model.expert_grams import ExpertGrams
from compression.model.experts import Experts, Routed, unfuse
from compression.model.hooks import ForwardHooks
from compression.model.streamed import StreamedModel
from tests.compression.expert_runs import GPTQ, run
from tests.compression.plans import codes, problem_of, problems_of
from tests.support.models import single_experts, tiny_model

SPARSE = FAMILIES["llama4_text"].sparse
BLOCK = "model.layers.0.feed_forward"
pytestmark = pytest.mark.usefixtures("no_gradients")


def tiny_llama4(folder: Path, **config: Any) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 96}
    heads = {"heads": 2, "head_dim": 16, "kv_heads": 1}
    settings = {**sizes, **heads, "num_local_experts": 4, **config}
    return tiny_model(folder, "llama4_text", dtype=torch.float32, **settings)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_block_computes_what_transformers_computes(top_k: int) -> None:
    """Bit for bit where products are exact, on small whole numbers and scores of 1; else to rounding."""
    assert SPARSE is not None
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
    for act, dtype, tolerance in (("relu", torch.float32, 0), ("silu", torch.float64, 1e-13)):
        torch.manual_seed(0)
        config = Llama4TextConfig(
            **sizes, num_local_experts=5, num_experts_per_tok=top_k, hidden_act=act, num_hidden_layers=1
        )
        layer = Llama4TextDecoderLayer(config, 0).to(dtype).eval()
        block = layer.feed_forward
        for parameter in block.parameters():
            whole = torch.randint(-2, 3, parameter.shape).to(dtype)
            parameter.copy_(whole if act == "relu" else torch.randn(parameter.shape).to(dtype) / 4)
        x = torch.randint(-2, 3, (2, 20, 32)).to(dtype)
        if act == "relu":  # every logit is far above 0: its sigmoid is 1
            x[..., 0] = 100
            block.router.weight[:, 0] = 5
        expected, logits = block(x)
        fused = block.experts
        unfuse(layer, SPARSE.experts)
        for number, expert in enumerate(layer.feed_forward.experts):
            gate, up = fused.gate_up_proj[number].T.chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(fused.down_proj[number].T)
        ours, our_logits = layer.feed_forward(x)
        assert torch.equal(our_logits, logits)
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
        assert logits.argmax(-1).unique().numel() > 2


def test_another_layout_of_stacks_is_a_plan_mismatch() -> None:
    assert SPARSE is not None
    config = Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=2, num_hidden_layers=1)
    with torch.device("meta"):
        layer = Llama4TextDecoderLayer(config, 0)
        fused = layer.feed_forward.experts
        fused.gate_up_proj = torch.nn.Parameter(torch.empty(2, 96, 32))
    with pytest.raises(PlanError) as caught:
        unfuse(layer, SPARSE.experts)
    assert caught.value.code == "plan_mismatch"


def test_each_linear_of_an_expert_is_a_slice_of_its_stack(tmp_path: Path) -> None:
    source = tiny_llama4(tmp_path / "model")
    made = plan(source, Recipe.model_validate(GPTQ), dataset=DatasetSpec(texts=("some text",)))
    expected = single_experts(load_file(source / "model.safetensors"))
    assert made.checkpoint.tensors.keys() == expected.keys()
    read = read_tensors(made.checkpoint, expected)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].is_contiguous()
        assert made.checkpoint.tensors[name].spec == (
            made.checkpoint.tensors[name].dtype,
            tuple(tensor.shape),
        )
    assert made.parameters == sum(tensor.numel() for tensor in expected.values())
    assert made.unknown == ()


def test_each_expert_has_the_gram_of_its_own_scaled_tokens(tmp_path: Path) -> None:
    """Against what Transformers hands to its experts, in float64; starved ones get some of what all read."""
    source = tiny_llama4(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    fused = whole.model.layers[0].feed_forward.experts
    fused.register_forward_pre_hook(lambda _module, args: seen.append(args[0].double().unflatten(0, (4, -1))))
    for seed in (0, 1):
        whole(input_ids=tokens(seed), use_cache=False)
    own = [torch.cat([x[expert][x[expert].any(-1)] for x in seen]) for expert in range(4)]
    everyone = torch.cat(own)
    assert len(everyone) == 80

    def through(expert: int, x: Tensor) -> Tensor:
        gate, up = (x @ fused.gate_up_proj[expert].double()).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    module, inputs = parked_before_experts(source)
    grams = ExpertGrams(module, inputs, 4)
    for stage, columns in (("gate_up", 32), ("down", 64)):
        for expert in range(4):
            x, y = own[expert], everyone
            if stage == "down":
                x, y = through(expert, x), through(expert, y)
            missing = max(columns - len(x), 0)
            expected = x.T @ x + missing / len(y) * (y.T @ y)
            gram = grams.gram(stage, expert)
            assert (gram.tokens, gram.borrowed) == (len(x) + missing, missing)
            torch.testing.assert_close(gram.matrix.double(), expected, rtol=1e-4, atol=1e-4)


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
    module = model.module.get_submodule(f"{BLOCK}.experts")
    assert isinstance(module, Experts)
    return module, list(inputs.inputs)


def test_tokens_of_each_expert_are_reported(tiny_texts: Path, tmp_path: Path) -> None:
    report = run(tiny_llama4(tmp_path / "model"), tmp_path / "out", tiny_texts)
    rows = {row.name: row for row in report.modules}
    counts = [rows[f"{BLOCK}.experts.{expert}.gate_proj"].tokens for expert in range(4)]
    assert sum(count or 0 for count in counts) == 4 * 64
    assert rows[f"{BLOCK}.shared_expert.up_proj"].tokens is None


def test_experts_that_are_left_out_are_written_one_by_one_too(tiny_texts: Path, tmp_path: Path) -> None:
    """vLLM reads stacks or single experts, and not both in one checkpoint."""
    source = tiny_llama4(tmp_path / "model", moe_layers=[0, 1])
    ignore = ["lm_head", r"re:model\.layers\.1\.feed_forward\.experts\."]
    run(source, tmp_path / "out", tiny_texts, [{**GPTQ[0], "ignore": ignore}])
    written = tensors_of(tmp_path / "out")
    expected = single_experts(load_file(source / "model.safetensors"))
    kept = [name for name in expected if ".layers.1.feed_forward.experts." in name]
    assert len(kept) == 12
    for name in kept:
        assert torch.equal(written[name], expected[name]), name
    assert f"{BLOCK}.experts.3.down_proj.weight_packed" in written
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in written)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in kept} <= set(config["ignore"])
    assert f"{BLOCK}.router" in config["ignore"]


@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_a_run_that_was_cut_goes_on_to_the_same_bytes(budget: int, tiny_texts: Path, tmp_path: Path) -> None:
    source = tiny_llama4(tmp_path / "model")
    run(source, tmp_path / "whole", tiny_texts)

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved) and event.layer == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "cut", tiny_texts, on_event=stop, activation_budget_bytes=budget)
    run(source, tmp_path / "cut", tiny_texts, activation_budget_bytes=budget)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


class TestPlan:
    def test_without_a_list_every_so_many_layers_have_experts(self, tmp_path: Path) -> None:
        source = tiny_llama4(tmp_path / "model", layers=4, moe_layers=[1, 3])
        change_config(source, moe_layers=None, interleave_moe_layer_step=2)
        made = plan(source, Recipe.model_validate([{"type": "rtn", "scheme": "FP8_DYNAMIC"}]))
        sparse = [layer.index for layer in made.layers if any(module.experts for module in layer.modules)]
        assert sparse == [1, 3]

    def test_a_stack_that_is_missing_is_named(self, tmp_path: Path) -> None:
        source = tiny_llama4(tmp_path / "model")
        tensors = load_file(source / "model.safetensors")
        del tensors[f"{BLOCK}.experts.down_proj"]
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        problem = problems_of(source)[0]
        assert problem.code == "checkpoint_incomplete"
        assert f"{BLOCK}.experts.down_proj" in problem.message

    def test_a_stack_of_another_number_of_experts_is_refused(self, tmp_path: Path) -> None:
        source = tiny_llama4(tmp_path / "model")
        change_config(source, num_local_experts=3)
        problem = problems_of(source)[0]
        assert problem.code == "shape_mismatch"
        assert f"{BLOCK}.experts.gate_up_proj is [4, 32, 128]" in problem.message

    @pytest.mark.parametrize(
        "changes",
        [
            {"moe_layers": "all"},
            {"moe_layers": [0, "1"]},
            {"moe_layers": None, "interleave_moe_layer_step": 0},
            {"num_hidden_layers": 1000, "num_local_experts": 1000},
        ],
    )
    def test_nonsense_about_experts_is_refused(self, changes: dict[str, Any], tmp_path: Path) -> None:
        source = tiny_llama4(tmp_path / "model", tokenizer=False)
        change_config(source, **changes)
        assert codes(problems_of(source)) == ["config_invalid"]

    def test_a_module_of_stacks_is_no_name_to_ignore(self, tmp_path: Path) -> None:
        recipe = Recipe.model_validate(
            {
                "steps": [{**GPTQ[0], "type": "rtn", "ignore": ["lm_head", f"{BLOCK}.experts"]}],
                "strict": True,
            }
        )
        assert problem_of(tiny_llama4(tmp_path / "model"), recipe).code == "pattern_matches_nothing"

    @pytest.mark.parametrize(
        ("scheme", "ignore", "warned"),
        [
            ("W4A16_ASYM", [], True),
            ("W4A16_ASYM", [r"re:.*self_attn"], False),
            ("W4A16", [], False),
            ("FP8_BLOCK", [], True),
            ("FP8_DYNAMIC", [], False),
        ],
    )
    def test_what_does_not_follow_rows_that_vllm_reorders(
        self, scheme: str, ignore: list[str], warned: bool, tmp_path: Path
    ) -> None:
        source = tiny_model(tmp_path / "model", "llama4_text")
        steps = [{"type": "rtn", "scheme": scheme, "ignore": ["lm_head", *ignore]}]
        warnings = plan(source, Recipe.model_validate(steps)).warnings
        assert any("reorders" in w.message for w in warnings if w.code == "not_served_by_vllm") == warned
