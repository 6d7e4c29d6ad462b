"""What decides a run's bits: which machines count as alike; and whose time a phase has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from compression.errors import ResourceError
from compression.machine import arithmetic
from compression.machine.arithmetic import Arithmetic, choose, resolve_device
from compression.machine.clock import Clock
from tests.support.fake_gpu import FakeGpu

CHOOSE = """
import json
import os
from compression.machine.arithmetic import choose
print(json.dumps(choose("cpu", "BF16").to_dict()))
"""


def chosen(monkeypatch: pytest.MonkeyPatch, **capabilities: Any) -> Arithmetic:
    """What a processor chooses that has these capabilities, and otherwise this one's."""
    here = {**torch.cpu.get_capabilities(), **capabilities}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", lambda: here)
        return choose("cpu", "F32")


def test_the_plan_has_the_class_of_a_device_and_the_worker_its_number() -> None:
    with FakeGpu(2):
        assert [resolve_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
        with pytest.raises(ResourceError, match="cuda:2 is not among them"):
            resolve_device("cuda:2")
        first, second = choose("cuda:0", "BF16"), choose("cuda:1", "BF16")
    assert first == second
    assert first.device == "cuda"
    assert first.obeyable(second)
    assert not first.obeyable(choose("cpu", "BF16"))
    assert resolve_device("auto") == "cpu"


def test_a_plan_that_was_stored_is_read() -> None:
    with FakeGpu():
        here = choose("cuda:0", "BF16")
    assert Arithmetic.from_dict(json.loads(json.dumps(here.to_dict()))) == here


@pytest.mark.parametrize(
    "other",
    [
        {"name": "NVIDIA H100 PCIe"},
        {"multiprocessors": 114},
        {"name": "NVIDIA H200 MIG 1g.18gb", "multiprocessors": 16},
    ],
)
def test_cards_of_one_architecture_are_told_apart(other: dict[str, Any]) -> None:
    with FakeGpu(name="NVIDIA H200", multiprocessors=132):
        here = choose("cuda:0", "BF16")
    with FakeGpu(**{"name": "NVIDIA H200", "multiprocessors": 132, **other}):
        assert not here.obeyable(choose("cuda:0", "BF16"))


@pytest.mark.parametrize("instructions", ["amx_bf16", "amx_tile", "avx512_bf16", "avx512_vnni", "avx_vnni"])
def test_processors_with_other_matrix_instructions_are_told_apart(
    instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATen calls them all AVX512, and machines in a cloud all have one name."""
    with_them = chosen(monkeypatch, **{instructions: True})
    without = chosen(monkeypatch, **{instructions: False})
    assert not with_them.obeyable(without)
    assert with_them.obeyable(chosen(monkeypatch, **{instructions: True}))
    assert not with_them.obeyable(chosen(monkeypatch, **{instructions: True, "l2_cache_size": 12345 << 10}))


def elsewhere(**environment: str) -> dict[str, Any]:
    """What a process chooses whose libraries are told so; they read it when they are loaded."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE], env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_limits_on_what_libraries_may_use_count() -> None:
    limited = elsewhere(ONEDNN_MAX_CPU_ISA="AVX2")
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in limited["capability"]
    assert limited["compute_dtype"] == "float32"  # without its instructions bfloat16 is several times slower
    here = choose("cpu", "BF16")
    assert not Arithmetic.from_dict(limited).obeyable(replace(here, threads=limited["threads"]))


def test_a_process_that_was_told_to_compute_less_exactly_is_told_otherwise() -> None:
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("medium")
    try:
        arithmetic.apply(choose("cpu", "F32"), "cpu")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


def test_a_phase_on_a_gpu_has_the_time_of_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done while somebody waits for it: 0.1 s of the inner phase's, 0.05 s of the outer's."""
    queued, waits = 0.0, 0

    def synchronize(_device: str) -> None:
        nonlocal queued, waits
        waits += 1
        time.sleep(queued)
        queued = 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = Clock("cuda:0")
    with clock.phase("outer"):
        queued = 0.05
        with clock.phase("inner"):
            queued = 0.1
    with clock.phase("later"):
        pass
    assert clock.seconds["inner"] == pytest.approx(0.1, abs=0.03)
    assert clock.seconds["outer"] == pytest.approx(0.05, abs=0.03)
    assert clock.seconds["later"] < 0.03
    assert waits == 6
    with pytest.raises(KeyError), clock.phase("fails"):  # what has gone wrong is told, not waited for
        raise KeyError
    assert waits == 7
    with clock.phase("later", waits=False):
        pass
    assert waits == 7


def test_the_clock_does_not_wait_on_a_cpu() -> None:
    clock = Clock("cpu")  # without CUDA, torch.cuda.synchronize fails
    with clock.phase("solve"):
        time.sleep(0.01)
    assert clock.seconds["solve"] >= 0.01
