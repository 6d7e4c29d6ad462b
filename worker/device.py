"""What this worker's machine has, found without importing torch. The engine chooses the device itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

DeviceClass = Literal["cpu", "cuda"]

MEBIBYTE = 1 << 20


def gpu_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Memory in bytes of the GPU that the engine will use (the first visible one); 0 where there is none."""
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if tool is None:
        return 0
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    answer = subprocess.run([*query, f"--id={visible}"], capture_output=True, text=True, timeout=60)
    return int(answer.stdout.split()[0]) * MEBIBYTE if answer.returncode == 0 else 0


def host_bytes(root: Path = Path("/")) -> int:
    """Memory in bytes that processes here may use: the machine's, or the container's limit if less."""
    meminfo = (root / "proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemTotal:"))
    limits = (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    given = [path.read_text().strip() for path in limits if path.is_file()]
    return min([total, *(int(limit) for limit in given if limit.isdigit())])


def device_class(wanted: Literal["auto", "cpu", "cuda"], gpu: int) -> DeviceClass:
    """The queue that this worker serves: as set, or cuda exactly when a GPU with `gpu` bytes was found."""
    if wanted == "auto":
        return "cuda" if gpu else "cpu"
    return wanted
