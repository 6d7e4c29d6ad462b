"""The pretended device refuses what CUDA refuses, and counts what a GPU would be waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.device_tensor import DeviceTensor
from tests.support.fake_gpu import Counts, FakeGpu

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu(2) as gpu:
        yield gpu


def there(*numbers: float, card: int = 0) -> Tensor:
    return torch.tensor(numbers, device=f"cuda:{card}")


def of(gpu: FakeGpu, work: Callable[[], object]) -> Counts:
    """What `work` costs."""
    before = gpu.counts()
    work()
    return gpu.counts() - before


def test_results_are_the_cpu_s_and_stay_on_the_device(gpu: FakeGpu) -> None:
    x = there(1.0, 2.0, 3.0)
    assert x.is_cuda
    doubled = (x * 2).add_(1)
    assert isinstance(doubled, DeviceTensor)
    assert doubled.device == torch.device("cuda:0")
    assert torch.equal(doubled.cpu(), torch.tensor([3.0, 5.0, 7.0]))
    part = doubled[1:]
    part.zero_()
    assert doubled.tolist() == [3.0, 0.0, 0.0]  # views share their numbers
    assert torch.empty_like(x, device="meta").is_meta
    assert torch.nn.Parameter(x, requires_grad=False).is_cuda
    assert gpu.used == {torch.device("cuda:0")}


@pytest.mark.usefixtures("gpu")
def test_devices_do_not_mix() -> None:
    x, host = there(1.0, 2.0), torch.ones(2)
    for mixed in (
        lambda: x + host,
        lambda: host.add_(x),
        lambda: torch.cat([x, host]),
        lambda: there(1.0, 2.0, card=1) + x,
        lambda: host[there(0).long()],
        lambda: torch.nn.functional.linear(x, torch.ones(3, 2)),
        lambda: x.__setitem__(slice(None), host),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (x * torch.tensor(2.0)).is_cuda  # a number goes with any device
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="looks into"):
        x.data_ptr()


@pytest.mark.usefixtures("gpu")
def test_what_cuda_lacks_is_refused() -> None:
    x = there(1.0, 2.0)
    with pytest.raises(RuntimeError, match="not implemented for integers"):
        torch.mm(x.long()[None], x.long()[:, None])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="no deterministic"):
            x.cumsum(0)
        assert x.long().cumsum(0).tolist() == [1, 3]
    finally:
        torch.use_deterministic_algorithms(before)


def test_launches_syncs_and_copies_are_told_apart(gpu: FakeGpu) -> None:
    x = there(1.0, 2.0, 3.0)
    mask, index = x > 1, there(0, 2).long()
    assert of(gpu, lambda: x.add_(1).mul_(2)) == Counts(launches=2)
    assert of(gpu, lambda: x.view(3, 1).t()[0].unbind()) == Counts()
    assert of(gpu, lambda: torch.empty(3, device=x.device)) == Counts()
    for waits in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: float(x.sum()),
        lambda: x.add(1).tolist(),
        lambda: x.add(1).cpu(),
        lambda: x.add(1).to("cpu", torch.float64),
        lambda: x.sum().is_nonzero(),
    ):
        assert of(gpu, waits).syncs == 1
    assert of(gpu, lambda: x[mask]) == Counts(launches=1, syncs=1)
    assert of(gpu, lambda: x[index]) == Counts(launches=1)
    assert of(gpu, lambda: torch.where(mask)).syncs == 1
    assert of(gpu, lambda: x.__setitem__(mask, 0.0)) == Counts(launches=1)  # torch makes it masked_fill_
    assert of(gpu, lambda: x.__setitem__(mask, x[mask])).syncs == 2
    assert of(gpu, lambda: x[:index[1]]).syncs == 1  # fmt: skip
    assert of(gpu, lambda: torch.ones(3).to("cuda:0")) == Counts(copies=1)
    assert of(gpu, lambda: torch.tensor([1.0], device="cuda:0")) == Counts(copies=1)
    assert of(gpu, lambda: torch.full((), 1.0, device="cuda:0")) == Counts(launches=1)
    assert of(gpu, lambda: x[[0, 1]]) == Counts(launches=1, copies=1)
    assert of(gpu, lambda: x.copy_(torch.ones(3))) == Counts(copies=1)
    assert of(gpu, lambda: torch.ones(3).copy_(x)) == Counts(syncs=1)
    assert all("test_fake_gpu.py" in event.line for event in gpu.launches + gpu.syncs + gpu.copies)


@pytest.mark.usefixtures("gpu")
def test_memory_is_counted_while_a_tensor_uses_it() -> None:
    x = torch.zeros(1000, device="cuda:0")
    assert torch.cuda.memory_allocated() == 4000
    view = x[:10]
    y = x + 1
    del x, y
    assert torch.cuda.memory_allocated() == 4000  # the view holds all of it
    assert torch.cuda.max_memory_allocated() == 8000
    view.untyped_storage().resize_(0)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0


def test_it_is_taken_away_again() -> None:
    with FakeGpu() as gpu:
        x = there(1.0)
        assert torch.cuda.get_device_properties(0).name == gpu.card.name
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="taken away"):
        x + 1
