"""The registry of methods: one entry is all that the rest of Bitmill needs to know of a method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression.catalogue import methods as catalogue
from compression.methods import METHODS, method_names, register
from tests.support.models import tiny_dataset, tiny_model

TOY = '''
"""Rounds towards zero: a whole method in one file."""

from typing import Literal

import torch
from pydantic import Field

from compression.math.grid import QuantizedWeight, Rounded
from compression.methods import Cost, Method, register
from compression.steps import QuantizingStep


class ToyStep(QuantizingStep):
    """Rounds every weight towards zero."""

    type: Literal["toy"] = "toy"
    strength: float = Field(default=1.0, strict=True, gt=0, le=1)


def towards_zero(weight, gram, args, params, *, keep, strength):
    assert gram is not None and keep is None and args.strategy == "channel"
    codes = (strength * weight / params.scale.float()).trunc().clamp(*args.range).to(torch.int8)
    return Rounded(QuantizedWeight(codes, params, args), dead_columns=int((gram.diagonal() == 0).sum()))


register(
    Method(
        ToyStep,
        "toy:towards_zero",
        "Rounds towards zero.",
        "Low recovery.",
        peer_name="ToyModifier",
        work_bytes=lambda numbers, gram: 1000 * numbers,
        cost=lambda step, linears: Cost(operations=1e18),
    )
)
'''

RUN = """
import json, sys
import toy
from compression import ToyModifier, ToyStep, compress, plan
from compression.catalogue import methods
from compression.__main__ import parser
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe

model, data, output = sys.argv[1:]
text = {"default_stage": {"default_modifiers": {"ToyModifier": {"scheme": "W8A8", "ignore": ["lm_head"]}}}}
recipe = Recipe.model_validate(text)
assert recipe == Recipe.from_short("W8A8", method="toy", has_dataset=True)
assert recipe == Recipe(steps=[ToyStep(scheme="W8A8")])
assert ToyModifier is ToyStep
step = {**recipe.steps[0].model_dump(), "strength": 0.5, "observer": "minmax"}
recipe = Recipe.model_validate({"steps": [step]})
options = dict(
    dataset=DatasetSpec(path=data),
    calibration=Calibration(num_calibration_samples=2, max_seq_length=32),
    evaluation=Evaluation(enabled=False),
)
planned = plan(model, recipe, **options)
rtn = plan(model, Recipe.from_short("W8A8", method="rtn", has_dataset=True), **options)
compress(model, recipe, output, **options)
print(json.dumps({
    "needs_data": recipe.needs_data,
    "refused_without_data": "dataset_required" in str(_refusal(model, recipe)),
    "operations": planned.duration.operations,
    "memory": [planned.memory.host_bytes, rtn.memory.host_bytes],
    "catalogue": [m.name for m in methods()],
    "command_line": "toy" in next(a.choices for a in parser()._actions if a.dest == "method"),
}))
""".replace(
    "planned = plan",
    """
def _refusal(model, recipe):
    try:
        plan(model, recipe, evaluation=Evaluation(enabled=False))
    except Exception as error:
        return [problem.code for problem in error.problems]

planned = plan""",
    1,
)


def test_a_method_is_one_file_that_registers_itself(tmp_path: Path) -> None:
    """From LLM Compressor's words through plan and estimates to the codes on disk."""
    model, data = tiny_model(tmp_path / "model", layers=1), tiny_dataset(tmp_path / "texts.jsonl")
    (tmp_path / "toy.py").write_text(TOY)
    command = [sys.executable, "-c", RUN, str(model), str(data), str(tmp_path / "out")]
    root = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["needs_data"]
    assert found["refused_without_data"]
    assert found["command_line"]
    assert found["operations"] > 1e18
    assert found["memory"][0] > found["memory"][1]
    assert found["catalogue"] == [*METHODS, "toy"]
    report = json.loads((tmp_path / "out" / "bitmill.json").read_text())["report"]["modules"]
    assert {row["method"] for row in report} == {"toy"}
    before = load_file(next(model.glob("*.safetensors")))
    after = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    assert len(report) == 7
    for row in report:
        weight, scale = before[row["name"] + ".weight"], after[row["name"] + ".weight_scale"]
        largest = weight.abs().amax(1, keepdim=True)
        assert torch.equal(scale, largest / torch.tensor(127.5, dtype=torch.bfloat16))
        codes = (0.5 * weight.double() / scale.double()).trunc()
        assert (after[row["name"] + ".weight"].double() - codes).abs().max() <= 1
        assert (after[row["name"] + ".weight"].double() == codes).double().mean() > 0.999


def test_every_solver_is_where_the_registry_says() -> None:
    assert all(callable(method.solve) for method in METHODS.values())
    assert [*METHODS] == ["rtn", "gptq", "awq", "smoothquant", "sparsegpt", "wanda", "magnitude"]
    assert (method_names("quantizes"), method_names("smooths")) == (("rtn", "gptq"), ("awq", "smoothquant"))


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="gptq"):
        register(METHODS["gptq"])


def test_the_catalogue_says_what_may_stand_beside_what() -> None:
    beside = {method.name: method.composes_with for method in catalogue()}
    assert "smoothquant" not in beside["awq"]
    assert set(beside["gptq"]) == METHODS.keys() - {"gptq"}
