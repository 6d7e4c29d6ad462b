"""LLM Compressor's own dump of a recipe of each of its modifiers is read, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from compression import Recipe
from compression.methods import peer_names
from compression.peer_recipe import load_recipe_yaml
from compression.schemes import SCHEMES
from tests.conformance.peer import in_peer

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

_GPTQ = {"type": "gptq", "scheme": "W8A8"}
_SMOOTH = {"type": "smoothquant", "smoothing_strength": 0.8}
_ASYM = {"type": "rtn", "scheme": "W4A16_ASYM"}
_SPARSE = {"type": "sparsegpt", "sparsity": 0.5, "mask_structure": "2:4", "ignore": []}
# an actorder of None it does not write, and reads what it has written as static
MEANT: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    "cache": [{"type": "rtn", "scheme": "FP8", "kv_cache_scheme": {}}],
    "observers": [{"type": "rtn", "scheme": "FP8", "observer": "mse"}],
    "gptq": [{"type": "gptq", "scheme": "W4A16"}],
    "gptq_plain": [{"type": "gptq", "scheme": "W4A16", "block_size": 64, "dampening_frac": 0.1}],
    "gptq_for_targets": [
        {"type": "gptq", "scheme": "W4A16", "targets": ["re:.*q_proj"]},
        {"type": "gptq", "scheme": "W8A16", "targets": ["re:.*o_proj"]},
    ],
    "smoothquant": [_SMOOTH, _GPTQ],
    "smoothquant_mappings": [_SMOOTH, _GPTQ],
    "awq": [{"type": "awq"}, _ASYM],
    "awq_mappings": [{"type": "awq", "duo_scaling": "both", "n_grid": 7}, _ASYM],
    "sparsegpt": [{**_SPARSE, "targets": [r"re:.*layers\.\d+(\.|$)"]}],
    "sparsegpt_linears": [{"type": "sparsegpt", "sparsity": 0.4}],
    "wanda": [{"type": "wanda", "sparsity": 0.5, "targets": [r"re:.*layers.0(\.|$)"], "ignore": []}],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipes")
    in_peer("peer_recipes.py", folder, "written.json")
    found: dict[str, Any] = json.loads((folder / "written.json").read_text())
    return found


def test_each_is_read_as_it_is_meant(written: dict[str, Any]) -> None:
    assert written["read"].keys() == MEANT.keys()
    for name, text in written["read"].items():
        assert Recipe.model_validate(load_recipe_yaml(text)) == Recipe.model_validate(MEANT[name]), name
    used = {step["type"] for steps in MEANT.values() for step in steps}
    assert used == set(peer_names().values())


def test_the_groups_that_it_writes_of_its_presets_are_our_schemes(written: dict[str, Any]) -> None:
    """Those that we have; the others are refused."""
    for preset, text in written["groups"].items():
        document = load_recipe_yaml(text)
        if preset in (*SCHEMES, "INT8"):
            (step,) = Recipe.model_validate(document).steps
            told = step.model_dump()
            assert told["scheme"] == ("W8A8" if preset == "INT8" else preset)
            assert told["observer"] == "minmax", preset
        else:
            with pytest.raises(ValidationError, match="none of the schemes"):
                Recipe.model_validate(document)
    assert SCHEMES.keys() <= written["groups"].keys()


def test_modifiers_without_a_counterpart_are_refused_by_name(written: dict[str, Any]) -> None:
    others = {name for name in written["modifiers"] if name.endswith("Modifier")} - peer_names().keys()
    assert {"QuIPModifier", "AutoRoundModifier", "MagnitudePruningModifier"} < others
    for name in others:
        with pytest.raises(ValidationError, match=name):
            Recipe.model_validate({"a_stage": {"b_modifiers": {name: {}}}})
