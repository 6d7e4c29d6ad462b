"""The suspended forward against the model that Transformers loads whole: the same bits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from compression.data.calibration import make_batches
from compression.errors import PlanError
from compression.families.decoder import Decoder, read_decoder
from compression.families.families import FAMILIES
from compression.model.batches import SuspendedBatches
from compression.model.hooks import ForwardHooks
from tests.compression.streaming import empty, hooks_of, planned, streamed, through_all_layers, tokens
from tests.support.models import load_model, tiny_model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def one_expert_at_a_time(experts: nn.Module, x: Tensor) -> Tensor:
    """What Llama 4's experts make of x [experts * tokens, hidden], in products of the size of ours. Their own
    are of all tokens, and round otherwise: test_llama4.py compares the function itself."""
    result = torch.zeros_like(x)
    of_experts = zip(x.chunk(experts.num_experts), result.chunk(experts.num_experts), strict=True)
    for number, (read, made) in enumerate(of_experts):
        chosen = read.any(-1)
        weights = (*experts.gate_up_proj[number].T.chunk(2), experts.down_proj[number].T)
        gate, up, down = (weight.contiguous() for weight in weights)
        inner = experts.act_fn(linear(read[chosen], gate)) * linear(read[chosen], up)
        made[chosen] = linear(inner, down)
    return result


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_at_a_time_gives_the_bits_of_the_whole_model(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path, model_type, layers=3, tied=model_type == "qwen3", shards=2)
    model = streamed(folder, dtype)
    batches = [tokens(seed=1), tokens(seed=2), tokens(batch=1, seq=7, seed=3)]
    stream = SuspendedBatches(hooks_of(model, folder), batches, quantize_activations=False)
    ours = through_all_layers(model, stream)
    reference = load_model(folder, dtype=dtype, experts_implementation="eager")
    for module in reference.modules():
        if isinstance(module, Llama4TextExperts):
            module.forward = partial(one_expert_at_a_time, module)
    for logits, batch in zip(ours, batches, strict=True):
        assert torch.equal(logits, reference(input_ids=batch, use_cache=False).logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shared_inputs_of_the_empty_model_are_those_of_the_plan(model_type: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, model_type)
    model = empty(folder)
    found = {frozenset(group) for group in model.trace()[0]}
    made = planned(folder)
    modules = [*(m for layer in made.layers for m in layer.modules), *made.kept]
    expected = {
        frozenset(m.name for m in modules if m.group == group) for group in {m.group for m in modules}
    }
    assert found == expected
    decoder = read_decoder(model.checkpoint.config)
    assert isinstance(decoder, Decoder)
    assert len(expected) == len(decoder.layer(0).groups) + len(decoder.layer(1).groups) + 1
    assert all(parameter.is_meta for parameter in model.module.parameters())


def test_groups_hand_over_what_the_linears_get_and_see_weights_that_were_replaced(tiny_llama: Path) -> None:
    model = streamed(tiny_llama)
    batches = [tokens(seed=4), tokens(seed=5)]
    stream = SuspendedBatches(hooks_of(model, tiny_llama), batches, quantize_activations=False)
    reference = load_model(tiny_llama, dtype=torch.float32)
    halved = {name: 0.5 * m.weight for name, m in reference.named_modules() if name.endswith("v_proj")}
    for name, weight in halved.items():
        reference.get_submodule(name).weight.copy_(weight)
    expected: dict[str, list[Tensor]] = {}
    for name, module in reference.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _m, args, name=name: expected.setdefault(name, []).append(args[0])
            )
    for batch in batches:
        reference(input_ids=batch, use_cache=False)

    visited = []
    for index in range(len(model)):
        model.load_layer(index)
        for group in stream.groups(index):
            visited.append(group.group)
            for ours, theirs in zip(group.inputs, expected[group.group], strict=True):
                assert torch.equal(ours, theirs), group.group
            if group.group.endswith("q_proj"):
                name = group.group.replace("q_proj", "v_proj")
                model.set_weights({name: halved[name]})
        model.drop_layer(index)
    firsts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert visited == [f"model.layers.{i}.{name}" for i in range(2) for name in firsts]


def test_a_wrong_table_of_shared_inputs_is_a_plan_mismatch(tiny_llama: Path) -> None:
    model = streamed(tiny_llama)
    attention = "model.layers.0.self_attn."
    hooks = ForwardHooks(model, {attention + "q_proj": "together", attention + "o_proj": "together"}, {})
    stream = SuspendedBatches(hooks, [tokens()], quantize_activations=False)
    model.load_layer(0)
    with pytest.raises(PlanError) as caught:
        stream.run_through(0)
    assert caught.value.code == "plan_mismatch"
    assert "o_proj" in str(caught.value)


def test_closing_a_stream_frees_what_its_batches_hold(tiny_llama: Path) -> None:
    model = streamed(tiny_llama)
    stream = SuspendedBatches(hooks_of(model, tiny_llama), [tokens()], quantize_activations=False)
    model.load_layer(0)
    group = next(stream.groups(0))
    held = weakref.ref(group.inputs[0])
    del group
    assert held() is not None
    stream.close()
    gc.collect()
    assert held() is None


def test_batches_stack_equal_lengths_up_to_the_budget() -> None:
    blocks = [torch.arange(length) for length in (4, 4, 4, 2, 2, 9)]
    shapes = [tuple(batch.shape) for batch in make_batches(blocks, batch_tokens=8)]
    assert shapes == [(2, 4), (1, 4), (2, 2), (1, 9)]
