"""The guide's rules give the guide's tables, to the digits they are printed with."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest

from compression.checkpoint.headers import read_checkpoint
from compression.checkpoint.sizes import layers, stored_bytes, vision_tower
from compression.checkpoint.tensors import StoredTensor
from compression.methods import GuideRule as Method
from compression.planning.guide import GuideEstimate, GuideModel, gigabytes, guide_estimate
from compression.planning.planner import plan
from compression.recipe import Calibration, DatasetSpec, Recipe
from tests.compression.fake_checkpoints import TINY, fake_llama, llama_shapes
from tests.compression.seed_models import deepseek_r1, llama_3_8b, qwen_2_5_vl_7b

GB = 10**9


def gb(printed: str) -> int:
    """Bytes of a size as the guide prints it: 0.5 is exactly half a decimal gigabyte."""
    nbytes = Decimal(printed) * GB
    assert nbytes == int(nbytes)
    return int(nbytes)


LLAMA = GuideModel(8 * GB, gb("0.5"), num_norms=2, hidden_size=4096)
DEEPSEEK = GuideModel(684 * GB, gb("22.4"), num_norms=4, hidden_size=7168)
QWEN = GuideModel(7 * GB, gb("0.4"), num_norms=2, hidden_size=3584, tower_bytes=gb("1.3"))
"""The guide's own, rounded inputs."""


def estimate(model: GuideModel, method: Method, *, offloads: bool = False) -> GuideEstimate:
    return GuideEstimate(model, method, samples=256, seq_len=512, offloads=offloads)


def shown(nbytes: int, printed: str) -> str:
    """With as many digits as the guide's figure has."""
    return str(gigabytes(nbytes, len(printed.partition(".")[2])))


@pytest.mark.parametrize(
    ("model", "method", "host", "gpu"),
    [
        (LLAMA, "rtn", "16", "0.5"),
        (DEEPSEEK, "rtn", "1368", "22.4"),
        (QWEN, "rtn", "14", "1.3"),
        (LLAMA, "gptq", "16", "1"),
        (DEEPSEEK, "gptq", "1368", "44.8"),
        (QWEN, "gptq", "14", "2.6"),
        (LLAMA, "sparsegpt", "16", "1"),
        (DEEPSEEK, "sparsegpt", "1368", "44.8"),
        (QWEN, "sparsegpt", "14", "2.6"),
        (LLAMA, "awq", "16", "2.64"),
        (DEEPSEEK, "awq", "1368", "29.9"),
        (QWEN, "awq", "14", "2.27"),
    ],
)
def test_the_three_tables(model: GuideModel, method: Method, host: str, gpu: str) -> None:
    made = estimate(model, method)
    assert shown(made.host_bytes, host) == host
    assert shown(made.gpu_bytes, gpu) == gpu


@pytest.mark.parametrize(("model", "printed"), [(LLAMA, "2.14"), (DEEPSEEK, "7.5"), (QWEN, "1.87")])
def test_activations_of_awq(model: GuideModel, printed: str) -> None:
    made = estimate(model, "awq")
    assert shown(made.activation_bytes, printed) == printed
    offloaded = estimate(model, "awq", offloads=True)
    assert offloaded.activation_bytes * model.num_norms == made.activation_bytes


def test_the_figure_that_contradicts_its_formula() -> None:
    """The guide's text has max(layer + activations, tower) = max(0.4 + 1.87, 1.3), and prints 3.17."""
    made = estimate(QWEN, "awq")
    assert made.tower_and_activations_bytes is not None
    assert shown(made.tower_and_activations_bytes, "3.17") == "3.17"
    assert shown(made.gpu_bytes, "2.27") == "2.27"
    assert estimate(LLAMA, "awq").tower_and_activations_bytes is None
    assert estimate(QWEN, "gptq").tower_and_activations_bytes is None


def test_figures_are_truncated_not_rounded() -> None:
    assert str(gigabytes(2_999_999_999, 2)) == "2.99"
    assert str(gigabytes(2_999_999_999, 0)) == "2"


def test_a_large_tower_decides() -> None:
    tower = GuideModel(7 * GB, gb("0.4"), num_norms=2, hidden_size=3584, tower_bytes=gb("9"))
    assert estimate(tower, "awq").gpu_bytes == gb("9")


def tensors_of(folder: Path) -> Mapping[str, StoredTensor]:
    return read_checkpoint(folder).tensors


def from_headers(tensors: Mapping[str, StoredTensor], num_layers: int, hidden_size: int) -> GuideModel:
    return GuideModel.of(
        tensors, layers_prefix="model.layers.", num_layers=num_layers, hidden_size=hidden_size
    )


class TestFromHeaders:
    """Sizes from headers, of families known or not; nothing is nominal here, so the figures differ."""

    def test_llama_3_8b(self, tmp_path: Path) -> None:
        tensors = tensors_of(llama_3_8b(tmp_path / "model"))
        found = layers(tensors, "model.layers.", 32)
        assert sorted(found) == list(range(32))
        assert {round(stored_bytes(layer) / GB, 3) for layer in found.values()} == {0.436}
        assert from_headers(tensors, 32, 4096) == GuideModel(8_030_261_248, 436_224_000, 2, 4096)

    def test_deepseek_r1(self, tmp_path: Path) -> None:
        """The layer for multi-token prediction is no decoder layer; it is counted in the whole."""
        tensors = tensors_of(deepseek_r1(tmp_path / "model"))
        found = layers(tensors, "model.layers.", 61)
        sizes = [round(stored_bytes(found[index]) / GB, 1) for index in (0, 2, 3, 60)]
        assert sizes == [1.2, 1.2, 23.0, 23.0]
        assert 61 not in found
        model = from_headers(tensors, 61, 7168)
        assert gigabytes(GuideEstimate(model, "rtn", 256, 512).host_bytes, 0) == 1368
        assert (model.num_norms, model.hidden_size, model.tower_bytes) == (4, 7168, 0)

    def test_qwen_2_5_vl_7b(self, tmp_path: Path) -> None:
        """The tower is told by its name; biases of q, k and v are no norms."""
        tensors = tensors_of(qwen_2_5_vl_7b(tmp_path / "model"))
        assert round(stored_bytes(tensors.values()) / GB, 1) == 16.6
        found = layers(tensors, "model.layers.", 28)
        assert len(found) == 28
        assert gigabytes(stored_bytes(found[0]), 1) == Decimal("0.4")
        assert gigabytes(stored_bytes(vision_tower(tensors)), 1) == Decimal("1.3")
        assert from_headers(tensors, 28, 3584).num_norms == 2

    def test_two_bytes_a_parameter_whatever_is_on_disk(self, tmp_path: Path) -> None:
        dtypes = dict.fromkeys(llama_shapes(TINY), "F32")
        tensors = tensors_of(fake_llama(tmp_path / "model", TINY, dtypes=dtypes))
        layer = layers(tensors, "model.layers.", 2)[0]
        assert from_headers(tensors, 2, 128).layer_bytes * 2 == stored_bytes(layer)


@pytest.mark.parametrize(
    ("types", "method"),
    [
        (["rtn"], "rtn"),
        (["smoothquant", "gptq"], "gptq"),
        (["sparsegpt", "rtn"], "sparsegpt"),
        (["magnitude"], "rtn"),
    ],
)
def test_the_step_that_takes_most_decides(types: list[str], method: Method) -> None:
    steps = [{"type": kind, **({"scheme": "W4A16"} if kind in ("rtn", "gptq") else {})} for kind in types]
    calibration = Calibration(num_calibration_samples=256, max_seq_length=512)
    made = guide_estimate(LLAMA, Recipe.model_validate({"steps": steps}), calibration)
    assert made == estimate(LLAMA, method)


@pytest.mark.parametrize("method", ["rtn", "gptq", "sparsegpt", "awq"])
def test_the_dict_shows_every_part(method: Method) -> None:
    made = estimate(QWEN, method).to_dict()
    sizes = {item["name"]: item["bytes"] for item in made["items"]}
    assert made["basis"] == "guide"
    assert made["host_bytes"] == sizes["model"]
    added = sizes["layer"] + sizes.get("activations", 0)
    assert made["gpu_bytes"] == max(added, sizes["vision tower"]) + sizes.get("Hessians", 0)
    assert all(item["basis"] for item in made["items"])


def test_every_plan_shows_it_beside_what_this_engine_takes(tmp_path: Path) -> None:
    recipe = Recipe.from_short("W4A16", has_dataset=True)
    made = plan(llama_3_8b(tmp_path / "model"), recipe, dataset=DatasetSpec(texts=("some text",)))
    memory = made.to_dict()["memory"]
    assert [memory[basis]["basis"] for basis in ("exact", "guide")] == ["exact", "guide"]
    assert memory["guide"]["host_bytes"] == 2 * 8_030_261_248
    assert memory["guide"]["gpu_bytes"] == 2 * 436_224_000
    assert memory["exact"]["host_bytes"] == made.memory.host_bytes != memory["guide"]["host_bytes"]
