"""What a worker says about its machine, read from files as they look on real machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from worker.device import device_class, gpu_bytes, host_bytes

MEMINFO = "MemTotal:       16384256 kB\nMemFree:         1000000 kB\n"


def machine(root: Path, limit: str | None) -> Path:
    (root / "proc").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    if limit is not None:
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory.max").write_text(limit)
    return root


def test_host_memory_is_the_container_s_limit_where_that_is_less(tmp_path: Path) -> None:
    assert host_bytes(machine(tmp_path / "bare", None)) == 16384256 * 1024
    assert host_bytes(machine(tmp_path / "unlimited", "max\n")) == 16384256 * 1024
    assert host_bytes(machine(tmp_path / "limited", "2147483648\n")) == 2147483648
    assert host_bytes() > 0


def fake_nvidia_smi(folder: Path, answer: str) -> dict[str, str]:
    """A driver tool that prints `answer` and, to a file, the arguments it got."""
    folder.mkdir()
    tool = folder / "nvidia-smi"
    record = folder / "arguments"
    tool.write_text(f"""#!{sys.executable}
import sys
open({str(record)!r}, "w").write(" ".join(sys.argv))
print({answer!r})
""")
    tool.chmod(0o755)
    return {"PATH": str(folder)}


def test_gpu_memory_is_that_of_the_visible_gpu_meant(tmp_path: Path) -> None:
    environment = fake_nvidia_smi(tmp_path / "bin", "81559")
    arguments = tmp_path / "bin" / "arguments"
    assert gpu_bytes("auto", {**environment, "CUDA_VISIBLE_DEVICES": "3,1"}) == 81559 << 20
    assert "--id=3" in arguments.read_text()
    assert gpu_bytes("cuda:1", {**environment, "CUDA_VISIBLE_DEVICES": "3,1"}) == 81559 << 20
    assert "--id=1" in arguments.read_text()
    assert gpu_bytes("cuda:2", environment) == 81559 << 20
    assert "--id=2" in arguments.read_text()
    assert gpu_bytes("auto", {**environment, "CUDA_VISIBLE_DEVICES": ""}) == 0
    assert gpu_bytes("cpu", environment) == 0
    assert gpu_bytes("auto", {"PATH": str(tmp_path)}) == 0


def test_the_device_class_follows_the_machine_unless_set() -> None:
    assert device_class("auto", 0) == "cpu"
    assert device_class("auto", 1) == "cuda"
    assert device_class("cpu", 1) == "cpu"
    assert device_class("cuda:1", 1) == "cuda"


def test_finding_out_does_not_import_torch() -> None:
    code = "import sys, worker.device as d; d.gpu_bytes('auto'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
