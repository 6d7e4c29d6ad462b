"""This machine's GPU and memory, found without importing torch. The engine chooses the device itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

DeviceClass = Literal["cpu", "cuda"]

MEBIBYTE = 1 << 20


def gpu_bytes(device: str, environment: Mapping[str, str] = os.environ) -> int:
    """Memory in bytes of the GPU that `device` (auto, cpu or cuda:N) means; 0 where there is none.

    N counts the GPUs of CUDA_VISIBLE_DEVICES where that is set; auto is the first.
    """
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if device == "cpu" or tool is None:
        return 0
    index = int(device.partition(":")[2] or 0)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    ids = [str(index)] if visible is None else visible.split(",")[index : index + 1]
    if not ids or ids[0] in ("", "-1"):
        return 0
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits", f"--id={ids[0]}"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return int(answer.stdout.split()[0]) * MEBIBYTE if answer.returncode == 0 else 0


def host_bytes(root: Path = Path("/")) -> int:
    """Memory in bytes that processes here may use: the machine's, or the container's limit if less."""
    meminfo = (root / "proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemTotal:"))
    limits = (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    set_limits = [path.read_text().strip() for path in limits if path.is_file()]
    return min([total, *(int(limit) for limit in set_limits if limit.isdigit())])


def device_class(device: str, gpu: int) -> DeviceClass:
    """The queue that a worker on `device` serves; auto is cuda where a GPU (of `gpu` bytes) was found."""
    if device == "auto":
        return "cuda" if gpu else "cpu"
    return "cuda" if device.startswith("cuda") else "cpu"
