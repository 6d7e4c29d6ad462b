"""What the engine sets up in its process before any arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


FIRST_TORCH = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"), os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"))
        return None

sys.meta_path.insert(0, Watch())
importlib.import_module({module!r})
"""


@pytest.mark.parametrize(
    "module", ["compression.pipeline", "compression.checkpoint.formats", "compression.math.gram"]
)
def test_what_torch_reads_when_it_starts_is_there_before(module: str) -> None:
    """Whatever is imported first: compressed-tensors, for one, makes tensors when it is imported."""
    names = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    script = FIRST_TORCH.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert done.stdout.split() == ["1", "32"]
