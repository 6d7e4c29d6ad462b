"""What torch's allocator lends on the CPU, counted by its own profiler."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def tensor_peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` took at one time."""
    gc.collect()  # what earlier tests left would be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    lent = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        lent += event.nbytes()
        peak = max(peak, lent)
    return peak
