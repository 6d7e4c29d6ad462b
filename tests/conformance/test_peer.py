"""RTN with min-max scales against LLM Compressor on the same random models.

On a float32 model every tensor is equal. On bfloat16 scales and zero points are; the peer divides and rounds
in bfloat16, we in float32, so some codes differ, and ours is then the nearer to w / scale.
"""

from __future__ import annotations

import json
import os
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor

from compression import compress
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.schemes import get_scheme
from tests.support.models import tiny_model

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHOICES = [
    ("W3A16", None),
    ("W4A16", None),
    ("W4A16", 64),
    ("W4A16_ASYM", None),
    ("W8A16", None),
    ("W4A8", None),
    ("W4AFP8", None),
    ("W8A8", None),
    ("FP8_DYNAMIC", None),
]
UNPACKED_BY_PEER = ("W4A8", "W4AFP8")
"""It gives each 4-bit code a byte (int-quantized); we pack them, as vLLM has kernels that read them so."""
IDS = [f"{scheme}-{group_size or 'preset'}" for scheme, group_size in CHOICES]


def job(folder: Path, dtype: str, method: str, scheme: str, group_size: int | None) -> dict[str, Any]:
    name = f"{dtype}-{method}-{scheme}-{group_size}"
    return {
        "source": str(folder / dtype),
        "output": str(folder / f"peer-{name}"),
        "method": method,
        "scheme": scheme,
        "group_size": group_size,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and what the peer makes of them, in one process."""
    folder = tmp_path_factory.mktemp("peer")
    for name, dtype in DTYPES.items():
        tiny_model(folder / name, dtype=dtype)
    jobs = [job(folder, dtype, "rtn", *choice) for dtype in DTYPES for choice in CHOICES]
    jobs.append(job(folder, "bfloat16", "gptq", "W4A16", None))
    subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("peer_rtn.py"))],
        input=json.dumps(jobs),
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(chain.from_iterable(load_file(path).items() for path in folder.glob("*.safetensors")))


def both(
    folder: Path, tmp_path: Path, dtype: str, scheme: str, group_size: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our tensors and the peer's. Also checks that the two configs say the same."""
    peer = job(folder, dtype, "rtn", scheme, group_size)
    step = {"type": "rtn", "scheme": scheme, "observer": "minmax", "group_size": group_size}
    recipe = Recipe.model_validate({"steps": [step]})
    compress(peer["source"], recipe, tmp_path / "ours", evaluation=Evaluation(enabled=False))
    our_config, their_config = config_of(tmp_path / "ours"), config_of(Path(peer["output"]))
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(Path(peer["output"]))
    if scheme in UNPACKED_BY_PEER:
        their_config = json.loads(json.dumps(their_config).replace("int-quantized", "pack-quantized"))
        theirs = pack_codes(theirs, get_scheme(scheme).weights.num_bits)
    assert our_config == their_config
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in theirs.items()
    }
    return ours, theirs


def pack_codes(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """int-quantized as pack-quantized."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            result[f"{name}_packed"] = pack_to_int32(tensor, bits)
            result[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            result[name] = tensor
    return result


def config_of(folder: Path) -> dict[str, Any]:
    """quantization_config without the version of the library that wrote it."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config.pop("version")
    return config


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.parametrize(("scheme", "group_size"), CHOICES, ids=IDS)
def test_float32_tensors_are_equal(folder: Path, tmp_path: Path, scheme: str, group_size: int | None) -> None:
    ours, theirs = both(folder, tmp_path, "float32", scheme, group_size)
    unequal = [name for name, tensor in ours.items() if not torch.equal(raw(tensor), raw(theirs[name]))]
    assert not unequal


@pytest.mark.parametrize(("scheme", "group_size"), CHOICES, ids=IDS)
def test_bfloat16_scales_are_equal_and_codes_no_worse(
    folder: Path, tmp_path: Path, scheme: str, group_size: int | None
) -> None:
    ours, theirs = both(folder, tmp_path, "bfloat16", scheme, group_size)
    source = tensors_of(folder / "bfloat16")
    bits = get_scheme(scheme).weights.num_bits
    compared = differing = 0
    for name in theirs:
        if not name.endswith((".weight_packed", ".weight")):
            assert torch.equal(ours[name], theirs[name]), name
            continue
        module = name.rpartition(".")[0]
        if f"{module}.weight_scale" not in theirs:
            assert torch.equal(ours[name], source[name]), name
            continue
        weight = source[f"{module}.weight"].float()
        scale = expanded(theirs[f"{module}.weight_scale"].float(), weight)
        zero_point = torch.zeros_like(weight)
        if f"{module}.weight_zero_point" in theirs:
            groups = (len(weight), theirs[f"{module}.weight_scale"].shape[1])
            packed = theirs[f"{module}.weight_zero_point"]
            zero_point = expanded(unpack_from_int32(packed, bits, groups, packed_dim=0).float(), weight)
        exact = weight / scale + zero_point
        our_codes, their_codes = (codes_of(each[name], weight, bits) for each in (ours, theirs))
        nearer = (our_codes - exact).abs() <= (their_codes - exact).abs()
        assert nearer.all(), name
        compared += weight.numel()
        differing += int((our_codes != their_codes).sum())
    assert compared == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert differing < 0.15 * compared


def expanded(groups: Tensor, weight: Tensor) -> Tensor:
    """[out, groups] -> [out, in]."""
    return groups.repeat_interleave(weight.shape[1] // groups.shape[1], dim=1)


def codes_of(stored: Tensor, weight: Tensor, bits: int) -> Tensor:
    """float32 codes [out, in] from what is on disk."""
    if stored.dtype == torch.int32:
        stored = unpack_from_int32(stored, bits, weight.shape)
    return stored.float()


def test_gptq_config_is_equal(folder: Path, tmp_path: Path, tiny_texts: Path) -> None:
    step = {"type": "gptq", "scheme": "W4A16", "observer": "minmax"}
    recipe = Recipe.model_validate({"steps": [step]})
    peer = job(folder, "bfloat16", "gptq", "W4A16", None)
    compress(
        peer["source"],
        recipe,
        tmp_path / "ours",
        dataset=DatasetSpec(path=str(tiny_texts)),
        calibration=Calibration(num_calibration_samples=4, max_seq_length=64),
        evaluation=Evaluation(enabled=False),
    )
    assert config_of(tmp_path / "ours") == config_of(Path(peer["output"]))
