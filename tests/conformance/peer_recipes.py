"""Dumps a recipe of each of the peer's modifiers, as it writes them. A script of its own: it runs under the
peer's interpreter.

    python peer_recipes.py OUTPUT.json

output: {"read": {name: yaml}, "groups": {preset: yaml}, "modifiers": [every class name that it knows]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import default_mappings
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.utils import DEFAULT_SMOOTHQUANT_MAPPINGS
from llmcompressor.recipe import Recipe

HEAD = ["lm_head"]
CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
TO_READ: dict[str, list[Any]] = {
    "rtn": [QuantizationModifier(scheme="FP8_DYNAMIC", ignore=HEAD)],
    "cache": [QuantizationModifier(scheme="FP8", ignore=HEAD, kv_cache_scheme=CACHE)],
    "observers": [
        QuantizationModifier(scheme="FP8", ignore=HEAD, weight_observer="mse", input_observer="minmax")
    ],
    "gptq": [GPTQModifier(scheme="W4A16", ignore=HEAD)],
    "gptq_plain": [
        GPTQModifier(scheme="W4A16", ignore=HEAD, actorder=None, block_size=64, dampening_frac=0.1)
    ],
    "gptq_for_targets": [
        GPTQModifier(scheme={"W4A16": ["re:.*q_proj"], "W8A16": ["re:.*o_proj"]}, ignore=HEAD)
    ],
    "smoothquant": [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(scheme="W8A8", ignore=HEAD)],
    "smoothquant_mappings": [
        SmoothQuantModifier(smoothing_strength=0.8, mappings=DEFAULT_SMOOTHQUANT_MAPPINGS),
        GPTQModifier(scheme="W8A8", ignore=HEAD),
    ],
    "awq": [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", ignore=HEAD)],
    "awq_mappings": [
        AWQModifier(mappings=default_mappings, duo_scaling="both", n_grid=7),
        QuantizationModifier(scheme="W4A16_ASYM", ignore=HEAD),
    ],
    "sparsegpt": [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=[r"re:.*layers\.\d+$"])],
    "sparsegpt_linears": [SparseGPTModifier(sparsity=0.4, ignore=HEAD)],
    "wanda": [WandaPruningModifier(sparsity=0.5, targets=["re:.*layers.0$"])],
}  # fmt: skip


def dump(modifiers: list[Any]) -> str:
    text: str = Recipe.from_modifiers(modifiers).yaml()
    return text


def grouped(preset: str) -> str:
    group = preset_name_to_scheme(preset, ["Linear"])
    return dump([QuantizationModifier(config_groups={"group_0": group}, ignore=HEAD)])


def known(cls: type) -> set[str]:
    return {name for sub in cls.__subclasses__() for name in (sub.__name__, *known(sub))}


if __name__ == "__main__":
    ModifierFactory.refresh()
    result = {
        "read": {name: dump(modifiers) for name, modifiers in TO_READ.items()},
        "groups": {name: grouped(name) for name in PRESET_SCHEMES if name != "UNQUANTIZED"},
        "modifiers": sorted(known(Modifier)),
    }
    Path(sys.argv[1]).write_text(json.dumps(result))
