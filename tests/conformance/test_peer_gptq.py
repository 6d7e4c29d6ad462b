"""GPTQ against LLM Compressor's, from the same Gram matrices, weights, scales and settings."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.math.gptq import gptq
from compression.math.gram import accumulate_gram
from compression.math.grid import QuantizationParams
from compression.math.search import minmax_params
from tests.compression.grids import WEIGHTS, correlated_inputs, library_args, restored
from tests.conformance.peer import in_peer

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

SHAPES = [(64, 128), (96, 256), (40, 640), (256, 384)]
SCHEMES = ["W4A16-g128", "W4A16_ASYM-g128", "W4A16-channel", "W8A8", "NVFP4A16"]
LAYERS = {
    f"{scheme}-{rows}x{columns}": (scheme, rows, columns) for scheme in SCHEMES for rows, columns in SHAPES
}


def layer(scheme: str, rows: int, columns: int) -> tuple[Tensor, Tensor, QuantizationParams]:
    """A random weight, the Gram matrix of correlated inputs, and min-max scales."""
    seed = rows + columns + SCHEMES.index(scheme)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    gram = accumulate_gram([correlated_inputs(3 * columns, columns, seed)])
    return weight, gram.matrix, minmax_params(weight, WEIGHTS[scheme].weights, torch.float32)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the peer makes of all layers: rounded weights [out, in]."""
    folder = tmp_path_factory.mktemp("peer")
    tensors, args = {}, {}
    for name, of in LAYERS.items():
        weight, gram, params = layer(*of)
        tensors |= {f"{name}.weight": weight, f"{name}.hessian": gram, f"{name}.scale": params.scale.float()}
        if params.zero_point is not None:
            tensors[f"{name}.zero_point"] = params.zero_point
        if params.global_scale is not None:
            tensors[f"{name}.global_scale"] = params.global_scale
        fields = library_args(WEIGHTS[of[0]].weights).model_dump(mode="json")
        args[name] = {**fields, "actorder": "static"}
    save_file(tensors, folder / "layers.safetensors")
    solved = folder / "solved.safetensors"
    in_peer("peer_gptq.py", folder, folder / "layers.safetensors", solved, request=json.dumps(args))
    return load_file(solved)


def proxy_loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """tr(D G D^T) in float64."""
    errors = rounded.double() - weight.double()
    return float(torch.einsum("oi,ij,oj->", errors, gram.double(), errors))


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_is_at_most_the_peers(name: str, peer: dict[str, Tensor]) -> None:
    weight, gram, params = layer(*LAYERS[name])
    args = WEIGHTS[LAYERS[name][0]].weights
    ours = gptq(weight, gram, args, params).weight
    loss = proxy_loss(weight, restored(ours.codes, params, args), gram)
    assert loss <= 1.001 * proxy_loss(weight, peer[name], gram)
