"""RTN with min-max scales against LLM Compressor on the same random models.

On a float32 model every tensor is equal. On bfloat16 scales and zero points are; the peer divides and rounds
in bfloat16, we in float32, so some codes differ, and ours is then the nearer to w / scale. Exceptions:
FP8 has one scale for linears that vLLM fuses (docs/adr/0010-one-scale-for-what-vllm-fuses.md), and what is
learned of activations is equal in what the first linears read: later ones see rounded weights here, and not
there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor

from compression import compress
from compression.data.calibration import load_blocks
from compression.math.grid import QuantizationParams
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.schemes import QuantizationArgs, get_scheme
from compression.steps import KVCacheScheme
from tests.compression.grids import spread
from tests.conformance.peer import in_peer
from tests.support.models import tiny_model

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

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
    ("FP8", None),
    ("FP8_BLOCK", None),
    ("MXFP8A16", None),
    ("MXFP8", None),
    ("MXFP4A16", None),
    ("MXFP4", None),
    ("NVFP4A16", None),
    ("NVFP4", None),
]
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
UNPACKED_BY_PEER = ("W4A8", "W4AFP8")
"""It gives each 4-bit code a byte (int-quantized); we pack them, as vLLM has kernels that read them so."""
WITH_EXPERTS = ("mixtral", "qwen3_moe", "llama4_text")
IGNORED_BY_PEER = {"llama4_text": ["re:.*router"]}
"""Its recipes for Llama 4 say so: the router is a linear there, which we never compress."""
NAMED_BY_PEER = {"mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}
"""It names every family's experts so; we leave them the names of the source, which vLLM's Mixtral reads."""
IDS = [f"{scheme}-{group_size or 'preset'}" for scheme, group_size in CHOICES]


DATA = Calibration(num_calibration_samples=4, max_seq_length=64)
ONE = Calibration(num_calibration_samples=1, max_seq_length=64)


def job(
    folder: Path,
    dtype: str,
    method: str,
    scheme: str,
    group_size: int | None,
    texts: Path | None = None,
    data: Calibration = DATA,
) -> dict[str, Any]:
    tokens = None
    if texts and (method == "gptq" or get_scheme(scheme).fixed_input):
        spec = DatasetSpec(path=str(texts))
        tokens = load_blocks(spec, folder / dtype, data, Evaluation(enabled=False)).calibration
    name = f"{dtype}-{method}-{scheme}-{group_size}"
    return {
        "source": str(folder / dtype),
        "output": str(folder / f"peer-{name}"),
        "method": method,
        "scheme": scheme,
        "group_size": group_size,
        "tokens": tokens and [block.tolist() for block in tokens],
        "ignore": ["lm_head", *IGNORED_BY_PEER.get(dtype, [])],
        "kv_cache_scheme": None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_texts: Path) -> Path:
    """The models, and what the peer makes of them, in one process."""
    folder = tmp_path_factory.mktemp("peer")
    for name, dtype in DTYPES.items():
        tiny_model(folder / name, dtype=dtype)
    for model_type in WITH_EXPERTS:
        tiny_model(folder / model_type, model_type, dtype=torch.float32)
    jobs = [job(folder, dtype, "rtn", *choice, tiny_texts) for dtype in DTYPES for choice in CHOICES]
    jobs.append(job(folder, "bfloat16", "gptq", "W4A16", None, tiny_texts))
    jobs += [job(folder, model_type, "rtn", "W4A16", None, tiny_texts) for model_type in WITH_EXPERTS]
    jobs.append(cache_job(folder, tiny_texts))
    in_peer("peer_rtn.py", folder, request=json.dumps(jobs))
    return folder


def cache_job(folder: Path, texts: Path) -> dict[str, Any]:
    """FP8 with keys and values in fp8, learned from one sample: the peer's ranges are a running mean."""
    result = job(folder, "float32", "rtn", "FP8", None, texts, ONE)
    output = result["output"] + "-cache"
    return {**result, "output": output, "kv_cache_scheme": KVCacheScheme().model_dump()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(chain.from_iterable(load_file(path).items() for path in folder.glob("*.safetensors")))


def both(
    folder: Path, texts: Path, tmp_path: Path, dtype: str, scheme: str, group_size: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our tensors and the peer's. Also checks that the two configs say the same."""
    peer = job(folder, dtype, "rtn", scheme, group_size)
    step = {"type": "rtn", "scheme": scheme, "observer": "minmax", "group_size": group_size}
    recipe = Recipe.model_validate({"steps": [step]})
    compress(
        peer["source"],
        recipe,
        tmp_path / "ours",
        dataset=DatasetSpec(path=str(texts)) if get_scheme(scheme).fixed_input else None,
        calibration=DATA,
        evaluation=Evaluation(enabled=False),
    )
    our_config, their_config = config_of(tmp_path / "ours"), config_of(Path(peer["output"]))
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(Path(peer["output"]))
    if scheme in UNPACKED_BY_PEER:
        their_config = json.loads(json.dumps(their_config).replace("int-quantized", "pack-quantized"))
        theirs = pack_codes(theirs, get_scheme(scheme).weights.num_bits)
    for their_name, our_name in NAMED_BY_PEER.get(dtype, {}).items():
        theirs = {name.replace(f".{their_name}.", f".{our_name}."): t for name, t in theirs.items()}
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
def test_float32_tensors_are_equal(
    folder: Path, tiny_texts: Path, tmp_path: Path, scheme: str, group_size: int | None
) -> None:
    ours, theirs = both(folder, tiny_texts, tmp_path, "float32", scheme, group_size)
    if scheme == "FP8":
        share_scales(theirs, tensors_of(folder / "float32"))
    unequal = [
        name
        for name, tensor in ours.items()
        if not torch.equal(raw(tensor), raw(theirs[name])) and not learned_later(name)
    ]
    assert not unequal
    for name in filter(learned_later, ours):
        assert ours[name] == pytest.approx(theirs[name], rel=0.3), name


def test_scales_of_keys_and_values(folder: Path, tiny_texts: Path, tmp_path: Path) -> None:
    peer = cache_job(folder, tiny_texts)
    step = {"type": "rtn", "scheme": "FP8", "observer": "minmax", "kv_cache_scheme": peer["kv_cache_scheme"]}
    compress(
        peer["source"],
        Recipe.model_validate({"steps": [step]}),
        tmp_path / "ours",
        dataset=DatasetSpec(path=str(tiny_texts)),
        calibration=ONE,
        evaluation=Evaluation(enabled=False),
    )
    assert config_of(tmp_path / "ours") == config_of(Path(peer["output"]))
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(Path(peer["output"]))
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in theirs.items()
    }
    scales = [name for name in ours if name.endswith((".k_scale", ".v_scale"))]
    assert len(scales) == 4
    for name in scales:  # ours are of the keys that rounded weights make of rounded hidden states
        assert ours[name] == pytest.approx(theirs[name], rel=0.1), name


def learned_later(name: str) -> bool:
    """What is learned of activations that depend on linears before them."""
    first = name.startswith("model.layers.0.") and "_proj." in name and name.split(".")[-2][0] in "qkv"
    return name.endswith((".input_scale", ".input_global_scale")) and not first


def share_scales(tensors: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """The peer's FP8 tensors as they are with the largest scale for all linears that vLLM fuses."""
    for parent in {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}:
        for fused in FUSED:
            scales = [tensors.get(f"{parent}.{leaf}.weight_scale") for leaf in fused]
            if scales[0] is None:
                continue
            largest = torch.stack(scales).amax(0)
            for leaf in fused:
                tensors[f"{parent}.{leaf}.weight_scale"] = largest
                weight = source[f"{parent}.{leaf}.weight"].float() / largest.float()
                tensors[f"{parent}.{leaf}.weight"] = weight.clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_experts_have_the_peers_names_and_tensors(
    folder: Path, tiny_texts: Path, tmp_path: Path, model_type: str
) -> None:
    ours, theirs = both(folder, tiny_texts, tmp_path, model_type, "W4A16", None)
    assert any(".experts.0." in name for name in ours)
    unequal = [name for name, tensor in ours.items() if not torch.equal(raw(tensor), raw(theirs[name]))]
    assert not unequal


@pytest.mark.parametrize(("scheme", "group_size"), CHOICES, ids=IDS)
def test_bfloat16_scales_are_equal_and_codes_no_worse(
    folder: Path, tiny_texts: Path, tmp_path: Path, scheme: str, group_size: int | None
) -> None:
    ours, theirs = both(folder, tiny_texts, tmp_path, "bfloat16", scheme, group_size)
    source = tensors_of(folder / "bfloat16")
    args = get_scheme(scheme).weights
    args = replace(args, group_size=group_size or args.group_size)
    if scheme == "FP8":
        share_scales(theirs, source)
    compared = differing = 0
    for name in theirs:
        if name.endswith((".input_scale", ".input_global_scale")):
            assert ours[name].float() == pytest.approx(theirs[name].float(), rel=0.3), name
            continue
        if not name.endswith((".weight_packed", ".weight")):
            assert torch.equal(raw(ours[name]), raw(theirs[name])), name
            continue
        module = name.rpartition(".")[0]
        if f"{module}.weight_scale" not in theirs:
            assert torch.equal(ours[name], source[name]), name
            continue
        weight = source[f"{module}.weight"].float()
        exact = in_codes(weight, module, theirs, args)
        our_codes, their_codes = (codes_of(each[name], weight, args) for each in (ours, theirs))
        nearer = (our_codes - exact).abs() <= (their_codes - exact).abs() + 1e-5
        assert nearer.all(), name
        compared += weight.numel()
        differing += int((our_codes != their_codes).sum())
    assert compared == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    assert differing < 0.15 * compared


def in_codes(weight: Tensor, module: str, tensors: dict[str, Tensor], args: QuantizationArgs) -> Tensor:
    """weight / scale + zero point, not rounded, float64 [out, in], by the tensors on disk."""
    scale, zero_point = tensors[f"{module}.weight_scale"], tensors.get(f"{module}.weight_zero_point")
    if zero_point is not None:
        shape = (len(weight), scale.shape[1])
        zero_point = unpack_from_int32(zero_point, args.num_bits, shape, packed_dim=0)
    params = QuantizationParams(scale, zero_point, tensors.get(f"{module}.weight_global_scale"))
    step, shift = spread(params, args, (weight.shape[0], weight.shape[1]))
    return weight.double() / step + shift


def codes_of(stored: Tensor, weight: Tensor, args: QuantizationArgs) -> Tensor:
    """float32 codes [out, in] from what is on disk."""
    if stored.dtype == torch.int32:
        stored = unpack_from_int32(stored, args.num_bits, weight.shape)
    if stored.dtype == torch.uint8:
        stored = unpack_fp4_from_uint8(stored, *weight.shape, dtype=torch.float32)
    return stored.float()


def test_gptq_config_is_equal(folder: Path, tmp_path: Path, tiny_texts: Path) -> None:
    step = {"type": "gptq", "scheme": "W4A16", "observer": "minmax"}
    recipe = Recipe.model_validate({"steps": [step]})
    peer = job(folder, "bfloat16", "gptq", "W4A16", None, tiny_texts)
    compress(
        peer["source"],
        recipe,
        tmp_path / "ours",
        dataset=DatasetSpec(path=str(tiny_texts)),
        calibration=DATA,
        evaluation=Evaluation(enabled=False),
    )
    assert config_of(tmp_path / "ours") == config_of(Path(peer["output"]))
