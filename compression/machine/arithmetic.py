"""Where and how arithmetic runs: the one module that chooses a device, a compute dtype and thread counts.

Everything chosen here changes bits, so it is chosen once, written to the resolved plan, and obeyed by later
attempts (docs/adr/0005-arithmetic-is-part-of-the-plan.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compression.errors import ResourceError
from compression.machine.batching import BATCH_TOKENS
from compression.machine.environment import ISA_LIMITS, LIBRARY_VARIABLES

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_THREADS_AT_IMPORT = torch.get_num_threads()
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_MATRIX_INSTRUCTIONS = (
    "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx10_1", "avx10_2", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
)  # fmt: skip
"""Those of `torch.cpu.get_capabilities` by which oneDNN, MKL and ATen choose the code of a product."""
_LEVELS_WITH_AMX = ("AVX512_CORE_AMX", "AVX10")
_LEVELS_WITH_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", *_LEVELS_WITH_AMX)


@dataclass(frozen=True)
class Arithmetic:
    """What decides the bits of a run, besides the data and the code.

    device: "cpu" or "cuda"; which card of its kind a run uses is the worker's business, and changes no bit.
    capability: what kernels are chosen by on this machine (`_capability`). compute_dtype: of the forward
    pass. batch_tokens: tokens in one forward pass.
    """

    device: str
    capability: str
    compute_dtype: str
    threads: int
    batch_tokens: int
    torch_version: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Arithmetic:
        """What `to_dict` gave, of an earlier run of the same work."""
        return cls(**data)

    def obeyable(self, here: Arithmetic) -> bool:
        """Whether a machine whose own choice is `here` can run this plan to the same bits."""
        same_kind = (self.device, self.capability) == (here.device, here.capability)
        return same_kind and self.torch_version == here.torch_version and self.threads <= available_threads()


def choose(device: str, stored_dtype: str, *, batch_tokens: int = BATCH_TOKENS) -> Arithmetic:
    """This machine's arithmetic for a checkpoint whose linears are stored as `stored_dtype` ("BF16").

    device: "cpu" or "cuda:N", as `resolve_device` gives it. A CPU without native 16-bit products computes in
    float32: the upcast is exact, and bfloat16 products are several times slower there than float32 ones.
    """
    native = device != "cpu" or (stored_dtype == "BF16" and _cpu_has_bfloat16())
    compute_dtype = _STORED[stored_dtype] if native else "float32"
    return Arithmetic(
        device=device_class(device),
        capability=_capability(device),
        compute_dtype=compute_dtype,
        threads=available_threads(),
        batch_tokens=batch_tokens,
        torch_version=str(torch.__version__),
    )


def apply(arithmetic: Arithmetic, device: str) -> None:
    """Make this process compute as the plan says, on `device` ("cpu" or "cuda:N"): threads, deterministic
    kernels, float32 products in float32, one attention backend. The device's peak of memory starts anew."""
    torch.set_num_threads(arithmetic.threads)
    torch.use_deterministic_algorithms(True)
    # deterministic algorithms fill every new tensor; but nothing reads what it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if arithmetic.device == "cuda":
        torch.cuda.set_device(device)  # what names no card, such as a copy from pinned memory, uses this one
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def products_of_bfloat16() -> Iterator[None]:
    """Multiply float32 matrices that hold bfloat16 numbers, exactly, by the fastest way that this CPU has.

    On one with AMX oneDNN takes the factors for bfloat16, which they are, and adds up and returns float32:
    measured 1,390 GFLOP/s for [1536, 4096] times its transpose on two cores, against 528 for float32. Without
    AMX float32 products are the fastest that keep float32 sums.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if _cpu_has_amx():
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def available_threads() -> int:
    """Cores this process may use: what the scheduler allows, or OMP_NUM_THREADS where that is less."""
    return min(len(os.sched_getaffinity(0)), _THREADS_AT_IMPORT)


def peak_host_bytes() -> int:
    """Highest resident set of this process so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match.group(1)) * 1024 if match else 0


def peak_device_bytes(device: str) -> int:
    """Highest allocation of tensors on the GPU since `apply`; 0 on the CPU."""
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def device_class(device: str) -> str:
    """ "cpu" or "cuda", of a device with or without its number."""
    return device.partition(":")[0]


def resolve_device(device: str) -> str:
    """The device that `device` (auto, cpu, cuda or cuda:N) means here: "cpu" or "cuda:N".

    Raises:
        ResourceError: `device_not_available`.
    """
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ResourceError("device_not_available", f"{device!r} is no device.", "Use auto, cpu or cuda:N.")
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise ResourceError(
            "device_not_available",
            f"This machine has {torch.cuda.device_count()} CUDA devices; cuda:{index} is not among them.",
            "Use auto or cpu, or run the job on a GPU worker.",
        )
    return f"cuda:{index}"


def _capability(device: str) -> str:
    """What kernels are chosen by, so that two machines of which this is the same give the same bits.

    Of a GPU the card, its architecture and its multiprocessors, by whose number cuBLAS cuts products: an H100
    has 114 on PCIe and 132 on SXM, an H200 132, a part of one (MIG) fewer. Of a CPU the level that ATen
    dispatches on, the model, the size of its level-2 cache, by which oneDNN and MKL cut products, the
    instructions of matrix products, and the variables that keep the libraries from using them.
    """
    if device != "cpu":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors"
    cpu = torch.cpu.get_capabilities()
    level = torch.backends.cpu.get_cpu_capability()
    parts = [f"{level} {cpu['cpu_name']}", f"{cpu.get('l2_cache_size', 0) >> 10} KiB"]
    parts += [name for name in _MATRIX_INSTRUCTIONS if cpu.get(name)]
    parts += [f"{name}={os.environ[name]}" for name in LIBRARY_VARIABLES if name in os.environ]
    return ", ".join(parts)


def _cpu_has_bfloat16() -> bool:
    """Whether bfloat16 products run on instructions of their own."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16")) and _onednn_may_use(_LEVELS_WITH_BFLOAT16)


def _cpu_has_amx() -> bool:
    """Whether bfloat16 products run on tiles, many times faster than float32 ones."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and _onednn_may_use(_LEVELS_WITH_AMX)


def _onednn_may_use(levels: tuple[str, ...]) -> bool:
    """Whether the environment leaves oneDNN one of these levels of instructions."""
    limit = next((os.environ[name] for name in ISA_LIMITS if name in os.environ), "ALL").upper()
    return limit in ("ALL", "DEFAULT") or limit.startswith(levels)
