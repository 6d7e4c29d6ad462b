"""Patterns mean what compressed-tensors means by them, and none can hold up the control plane."""

from __future__ import annotations

import re
import time

import pytest
import torch
from compressed_tensors.utils.match import is_match

from compression.planning.targets import matcher, pattern_problem

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 10, 101)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
] + ["lm_head"]

USUAL = [
    "Linear",
    "lm_head",
    "model.layers.0.mlp.down_proj",
    "re:.*",
    "re:.*lm_head",
    "re:.*self_attn.*",
    r"re:.*\.(q|k|v|o)_proj$",
    r"re:model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r"re:model\.layers\.(0|1|2|3|4|5|6|7|8|9|10)\..*",
    r"re:.*layers\.(1\d*|2\d?|[0-9])\.mlp.*",
    r"re:.*mlp\.(?!gate)\w+_proj",
    r"re:(?i).*MLP.*",
    r"re:.*[.](?P<part>mlp|self_attn)[.].*_proj",
    r"re:model.layers.[0-9]{1,2}\.mlp",
    "re:q_proj",
    "re:model.layers.1",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_patterns_match_as_in_compressed_tensors(pattern: str) -> None:
    assert pattern_problem(pattern, "") is None
    matches = matcher([pattern])
    linear, embedding = torch.nn.Linear(1, 1), torch.nn.Embedding(1, 1)
    for name in NAMES:
        assert matches(name, True) == is_match(name, linear, pattern)
        assert matches(name, False) == is_match(name, embedding, pattern)


HOSTILE = [
    "(.+)+x$",
    "(.*)*x$",
    "((.*))+x$",
    "(.|.)*x$",
    "(?:.|..)+x$",
    "(?:a?)+b",
    "(.+){2,}x",
    "(.{1,9}){9}x",
    "(" * 20 + ".*" + ")+" * 20,
    ".*" * 6 + "!",
    "(.|.)" * 30 + "!",
    "(?:.|.|.|.)" * 13 + "!",
    ".?" * 30 + "!",
    "|".join([".*.*.*x"] * 60),
    "(a{1000}){1000}",
    r"(.*)\1x",
    "(?P<a>.)(?P=a)",
    "(.)?(?(1)a|b)",
    "(.+)(?#comment)+x",
    "(?x)(.+ ) +x",
    "(?ix: (.+) +x)",
    "a" * 501,
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_what_could_backtrack_for_long_is_refused_at_once(expression: str) -> None:
    start = time.perf_counter()
    problem = pattern_problem(f"re:{expression}", "/recipe/steps/0/ignore/0")
    assert problem is not None
    assert (problem.code, problem.pointer) == ("pattern_invalid", "/recipe/steps/0/ignore/0")
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    "expression", ["(", "[", "*a", "a{2,1}", "(?P<1>a)", "\\", "(?<=a+)b", "(" * 250 + ")" * 250]
)
def test_what_is_no_expression_is_refused(expression: str) -> None:
    problem = pattern_problem(f"re:{expression}", "")
    if problem is None:
        re.compile(expression)
    else:
        assert problem.code == "pattern_invalid"


@pytest.mark.parametrize(
    "expression",
    [".*.*.*.*!", ".*.*.*(a|b|c|d|.|..)!", "[^!]*.*.*.*!", r"\w*.?.?.?.?.*.*!", r".*\d*\d*\d*\d*.*!"],
)
def test_the_worst_that_is_let_through_is_quick(expression: str) -> None:
    assert pattern_problem(f"re:{expression}", "") is None
    matches = matcher([f"re:{expression}"])
    name = "model.layers.100.self_attn.q_proj"
    start = time.perf_counter()
    for _ in range(10):
        assert not matches(name, True)
    assert time.perf_counter() - start < 1
