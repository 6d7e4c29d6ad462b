"""What Transformers makes of every scheme, and whether the plan and docs/schemes.md say so.

Each checkpoint is loaded as a user would, and its logits are compared with those of what it means: scale
times code by formula, activations quantized by the library (tests/support/readers.py), all in the same dtype.
Where a reader is mended, or a new one brings a fault, a test here fails: then planning/loaded.py and the page
change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CompressedTensorsConfig

from compression import Calibration, DatasetSpec, Evaluation, Recipe, compress
from compression.errors import PlanError
from compression.planning.loaded import NOT_LOADED
from compression.planning.planner import plan
from compression.planning.served import NOT_SERVED
from compression.schemes import SCHEMES, get_scheme
from tests.support.models import load_model, tiny_model
from tests.support.readers import as_meant

PAGE = Path(__file__).parents[2] / "docs" / "schemes.md"
HEADER = "| scheme | linears in Transformers | experts in Transformers | linears in vLLM | experts in vLLM |"
SMALL = Calibration(num_calibration_samples=2, max_seq_length=32)
TOKENS = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(1))

AS_MEANT, WEIGHTS, REFUSED, OTHER, UNPLANNED = "yes", "weights only", "no", "no, in silence", "not made"
"""What is seen. WEIGHTS: activations inside of experts are not quantized; UNPLANNED: the plan refuses it."""

Steps = list[dict[str, Any]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {"hidden_size": 256, "moe_intermediate_size": 256},
    "qwen3_moe-sparse": {"hidden_size": 256, "moe_intermediate_size": 256, "mlp_only_layers": []},
    "llama4_text": {"hidden_size": 256},
    "phi3": {}, "deepseek_v3": {"hidden_size": 256, "moe_intermediate_size": 256, "n_group": 1}, "llava": {},
}  # fmt: skip
EXPERTS, ATTENTION, FIRST = r"re:.*mlp\.experts.*", r"re:.*self_attn.*", r"re:.*layers\.0\..*"


def rtn(scheme: str, **fields: Any) -> dict[str, Any]:
    return {"type": "rtn", "scheme": scheme, **fields}


def ignoring(scheme: str, *patterns: str) -> Steps:
    return [rtn(scheme, ignore=["lm_head", *patterns])]


OTHERS: dict[str, tuple[str, Steps]] = {
    **{f"{model} in {name}": (model, [rtn(name)])
       for model, names in {
           "phi3": ("W4A16_ASYM", "FP8_BLOCK", "NVFP4"), "llava": ("W4A16_ASYM", "FP8", "MXFP4A16"),
           "llama4_text": ("W4A16_ASYM", "W8A16", "FP8_BLOCK", "MXFP8A16", "NVFP4A16"),
           "deepseek_v3": ("W4A16", "NVFP4A16"),
       }.items() for name in names},
    **{f"no experts in {name}": ("qwen3_moe", ignoring(name, EXPERTS))
       for name in ("W4A16", "W8A8", "FP8_BLOCK", "MXFP8A16", "MXFP4A16", "NVFP4")},
    "only experts in W4A16": ("qwen3_moe", ignoring("W4A16", ATTENTION)),
    "no first layer in W4A16": ("qwen3_moe-sparse", ignoring("W4A16", FIRST)),
    "no first layer in FP8_DYNAMIC": ("qwen3_moe-sparse", ignoring("FP8_DYNAMIC", FIRST)),
    "FP8_DYNAMIC, experts W4A16": ("qwen3_moe", [rtn("FP8_DYNAMIC", targets=[ATTENTION]), rtn("W4A16")]),
    "experts W8A16, the rest NVFP4A16": ("qwen3_moe", [rtn("W8A16", targets=[EXPERTS]), rtn("NVFP4A16")]),
    "W8A16, experts W4A16_ASYM": ("qwen3_moe", [rtn("W8A16", targets=[ATTENTION]), rtn("W4A16_ASYM")]),
    "experts that differ by layer": ("qwen3_moe-sparse", [rtn("W4A16", targets=[FIRST]), rtn("W8A16")]),
    "a layer in FP8_DYNAMIC, the rest W4A16": ("llama", [rtn("FP8_DYNAMIC", targets=[FIRST]), rtn("W4A16")]),
    "W3A16 in groups of 8": ("llama", [rtn("W3A16", group_size=8)]),
    "experts in groups of 16": ("qwen3_moe", [rtn("W4A16", group_size=16)]),
    "pruned, then W4A16": ("llama", [{"type": "magnitude", "mask_structure": "2:4"}, rtn("W4A16")]),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What Transformers makes of a checkpoint, and what the plan warned of."""

    seen: str
    warned: frozenset[str]


Read = Callable[[str, Steps], Outcome]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, tiny_texts: Path) -> Read:
    """Compresses a model and loads the result; each of them once."""
    root, known = tmp_path_factory.mktemp("readers"), dict[str, Outcome]()

    def once(model: str, steps: Steps) -> Outcome:
        key = json.dumps([model, steps])
        if key not in known:
            source = root / model
            if not source.exists():
                tiny_model(source, model.partition("-")[0], **MODELS[model])
            known[key] = outcome(source, root / str(len(known)), steps, tiny_texts)
        return known[key]

    return once


def outcome(source: Path, out: Path, steps: Steps, texts: Path) -> Outcome:
    try:
        codes = compressed(source, out, steps, texts)
    except PlanError as error:
        if error.code != "experts_need_dynamic_activations":
            raise
        return Outcome(UNPLANNED, frozenset())
    return Outcome(seen(out), codes)


def compressed(source: Path, out: Path, steps: Steps, texts: Path) -> frozenset[str]:
    """Codes of what the plan warned of."""
    recipe = Recipe.model_validate(steps)
    learns = any(get_scheme(step.scheme).fixed_input for step in recipe.quantizing.values())
    options: dict[str, Any] = {
        "dataset": DatasetSpec(path=str(texts)) if learns else None,
        "calibration": SMALL,
        "evaluation": Evaluation(enabled=False),
    }
    compress(source, recipe, out, **options)
    return frozenset(warning.code for warning in plan(source, recipe, **options).warnings)


def seen(folder: Path) -> str:
    try:
        logits = logits_of(load_model(folder))
    except (RuntimeError, AttributeError):  # what Transformers and torch say of tensors that do not fit
        return REFUSED
    for what, rounds in ((AS_MEANT, True), (WEIGHTS, False)):
        if close(logits, logits_of(as_meant(folder, torch.bfloat16, experts_round=rounds))):
            return what
    return OTHER


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits.float()


def close(logits: Tensor, expected: Tensor) -> bool:
    """Both are computed in the same steps; what is read wrong differs by a tenth and more, rounding of
    activations in experts by a hundredth and more."""
    return float((logits - expected).norm() / expected.norm()) < 1e-3


def says(outcome: Outcome, code: str, wrong: Iterable[str]) -> None:
    assert (code in outcome.warned) == (outcome.seen in wrong), outcome


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_plan_warns_of_what_transformers_does_not_load(scheme: str, model: str, read: Read) -> None:
    says(read(model, [rtn(scheme)]), NOT_LOADED, (REFUSED, OTHER))


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_does_for_other_structures_and_recipes(name: str, read: Read) -> None:
    says(read(*OTHERS[name]), NOT_LOADED, (REFUSED, OTHER))


def test_the_page_says_what_was_seen(read: Read) -> None:
    """vLLM's columns are what the plan says: nothing but its own tests on a GPU could hold them."""
    rows = []
    for scheme in SCHEMES:
        linears, experts = read("llama", [rtn(scheme)]), read("qwen3_moe", [rtn(scheme)])
        vllm = [
            UNPLANNED if each.seen == UNPLANNED else REFUSED if NOT_SERVED in each.warned else AS_MEANT
            for each in (linears, experts)
        ]
        rows.append(f"| {' | '.join([f'`{scheme}`', linears.seen, experts.seen, *vllm])} |")
    lines = [*PAGE.read_text().splitlines(), ""]
    start = lines.index(HEADER) + 2
    assert lines[start : start + len(rows) + 1] == [*rows, ""]


def test_zero_points_are_read_where_weights_are_dequantized(tmp_path: Path, tiny_texts: Path) -> None:
    """As the warning's hint says."""
    source, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    compressed(source, out, [rtn("W4A16_ASYM")], tiny_texts)
    (warning,) = plan(source, Recipe.model_validate([rtn("W4A16_ASYM")])).warnings
    assert "quantization_config=CompressedTensorsConfig(dequantize=True)" in warning.hint
    assert "in the compressed-tensors format; vLLM loads it." in (out / "README.md").read_text()
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load_model(out, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert close(logits_of(model), logits_of(as_meant(out, torch.bfloat16)))


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("MXFP8A16", torch.float16),
        ("MXFP4A16", torch.float32),
        ("NVFP4A16", torch.float16),
        ("NVFP4", torch.float32),
    ],
)
def test_formats_that_are_read_in_bfloat16_say_so(
    scheme: str, dtype: torch.dtype, tmp_path: Path, tiny_texts: Path
) -> None:
    source, out = tiny_model(tmp_path / "model", dtype=dtype), tmp_path / "out"
    assert "read_in_bfloat16" in compressed(source, out, [rtn(scheme)], tiny_texts)
    assert seen(out) == AS_MEANT
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    weights = {name: each for file in out.glob("*.safetensors") for name, each in load_file(file).items()}
    assert weights["model.embed_tokens.weight"].dtype == dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config))
    assert seen(out) == REFUSED, "readers are mended: the dtype may stay"


def test_others_keep_their_dtype(tmp_path: Path, tiny_texts: Path) -> None:
    source, out = tiny_model(tmp_path / "model", dtype=torch.float16), tmp_path / "out"
    assert not compressed(source, out, [rtn("W4A16")], tiny_texts)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
