"""Where and how arithmetic runs: the one module that chooses a device, a compute dtype and thread counts.

Everything chosen here changes bits, so it is chosen once, written to the resolved plan, and obeyed by later
attempts (docs/adr/0005-arithmetic-is-part-of-the-plan.md).
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compression.errors import ResourceError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_THREADS_AT_IMPORT = torch.get_num_threads()
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Arithmetic:
    """What decides the bits of a run, besides the data and the code.

    device: "cpu" or "cuda:N". capability: the instruction set or GPU architecture that kernels dispatch on.
    compute_dtype: of the forward pass. gram_precision: see `compression.gram`. batch_tokens: tokens in one
    forward pass.
    """

    device: str
    capability: str
    compute_dtype: str
    gram_precision: Literal["mixed", "float32"]
    threads: int
    batch_tokens: int
    torch_version: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def obeyable(self, here: Arithmetic) -> bool:
        """Whether a machine whose own choice is `here` can run this plan to the same bits."""
        same_kind = self.device.split(":")[0] == here.device.split(":")[0]
        same_code = (self.capability, self.torch_version) == (here.capability, here.torch_version)
        return same_kind and same_code and self.threads <= available_threads()


def choose(device: str, stored_dtype: str, *, batch_tokens: int = 4096) -> Arithmetic:
    """This machine's arithmetic for a checkpoint whose linears are stored as `stored_dtype` ("BF16").

    A CPU without native 16-bit products computes in float32: the upcast is exact, and bfloat16 products are
    several times slower there than float32 ones.

    Raises:
        ResourceError: `device_not_available`.
    """
    device = _resolve_device(device)
    native = device != "cpu" or (stored_dtype == "BF16" and _cpu_has_bfloat16())
    compute_dtype = _STORED[stored_dtype] if native else "float32"
    return Arithmetic(
        device=device,
        capability=_capability(device),
        compute_dtype=compute_dtype,
        gram_precision="mixed",
        threads=available_threads(),
        batch_tokens=batch_tokens,
        torch_version=str(torch.__version__),
    )


def apply(arithmetic: Arithmetic) -> None:
    """Make this process compute as the plan says: threads, deterministic kernels, one attention backend."""
    torch.set_num_threads(arithmetic.threads)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = False


def available_threads() -> int:
    """Cores this process may use: what the scheduler allows, or OMP_NUM_THREADS where that is less."""
    return min(len(os.sched_getaffinity(0)), _THREADS_AT_IMPORT)


def peak_host_bytes() -> int:
    """Highest resident set of this process so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match.group(1)) * 1024 if match else 0


def peak_device_bytes(device: str) -> int:
    """Highest allocation on the GPU so far; 0 on the CPU."""
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def _resolve_device(device: str) -> str:
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
    if device == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()} {torch.cpu.get_capabilities()['cpu_name']}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
