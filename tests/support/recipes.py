"""Recipes that between them write every scheme by every method that makes it."""

from __future__ import annotations

from typing import Any

from compression.schemes import SCHEMES, SPARSE_SCHEMES

Steps = list[dict[str, Any]]

_SMOOTH = {"type": "smoothquant", "smoothing_strength": 0.8}
_AWQ = {"type": "awq", "n_grid": 4}
_FP8_CACHE = {"num_bits": 8, "type": "float"}
_ROUNDED: dict[str, Steps] = {
    f"{scheme}-{method}": [{"type": method, "scheme": scheme}]
    for scheme in SCHEMES
    for method in ("rtn", "gptq")
}
_PRUNED: dict[str, Steps] = {
    f"{name}-{method}": [{"type": method, **fields}]
    for name, fields in SPARSE_SCHEMES.items()
    for method in ("sparsegpt", "wanda", "magnitude")
}
_COMBINED: dict[str, Steps] = {
    "W4A16-group-32": [{"type": "gptq", "scheme": "W4A16", "group_size": 32, "observer": "gram"}],
    "W4A16_ASYM-group-32": [{"type": "gptq", "scheme": "W4A16_ASYM", "group_size": 32, "observer": "mse"}],
    "W4A16-awq": [{**_AWQ, "scheme": "W4A16"}],
    "W4A16_ASYM-awq": [{**_AWQ, "scheme": "W4A16_ASYM"}],
    "W4A16-awq-gptq": [_AWQ, {"type": "gptq", "scheme": "W4A16"}],
    "NVFP4A16-awq": [{**_AWQ, "scheme": "NVFP4A16"}],
    "W8A8-smoothquant-gptq": [_SMOOTH, {"type": "gptq", "scheme": "W8A8"}],
    "FP8_DYNAMIC-smoothquant-rtn": [_SMOOTH, {"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    "FP8-kv-cache": [{"type": "rtn", "scheme": "FP8", "kv_cache_scheme": _FP8_CACHE}],
    "W4A16-sparsegpt-gptq": [
        {"type": "sparsegpt", "mask_structure": "2:4"},
        {"type": "gptq", "scheme": "W4A16"},
    ],
    "W8A8-wanda-rtn": [{"type": "wanda"}, {"type": "rtn", "scheme": "W8A8"}],
}

QUANTIZED: dict[str, Steps] = _ROUNDED | _COMBINED
RECIPES: dict[str, Steps] = QUANTIZED | _PRUNED
