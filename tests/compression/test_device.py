"""What the engine sets up in its process before any arithmetic."""

import subprocess
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRIPT = r"""
import re
import compression.pipeline
import torch
activations = torch.ones(1 << 24)
print(sum(map(int, re.findall(r"AnonHugePages: +(\d+) kB", open("/proc/self/smaps").read()))))
"""


def test_large_tensors_lie_on_huge_pages_where_the_kernel_lends_them() -> None:
    lent = "[never]" not in HUGE_PAGES.read_text()
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, stdout=subprocess.PIPE, text=True)
    assert (int(done.stdout) > 0) == lent
