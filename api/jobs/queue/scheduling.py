"""Why a waiting job is not taken: the same rules as `leases.claim`, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from api.jobs.ledger.repository import Postponed, Version
from api.jobs.queue.workers import Worker

_GIB = 1 << 30


class Obstacle(BaseModel):
    """What keeps a job waiting. code: no_worker or unschedulable until another worker comes, quota_running
    until another job of the project has ended, attached until the one in `deduplicated_from` has,
    store_denied, store_unreachable or host_failed until it is tried again."""

    code: Literal[
        "no_worker", "unschedulable", "quota_running", "attached",
        "store_denied", "store_unreachable", "host_failed",
    ]  # fmt: skip
    message: str


def obstacle(job: Version, alive: Sequence[Worker]) -> Obstacle | None:
    """What keeps a job waiting until another worker comes, or until its original has ended; None where one of
    these workers could claim it."""
    if job.deduplicated_from is not None:
        message = f"The job waits for {job.deduplicated_from}, which does the same work."
        return Obstacle(code="attached", message=message)
    able = [worker for worker in alive if job.device_class in ("any", worker.device_class)]
    if not able:
        kind = "" if job.device_class == "any" else f" with the device class {job.device_class}"
        return Obstacle(code="no_worker", message=f"No worker{kind} is alive.")
    roomy = [worker for worker in able if worker.host_bytes >= job.required_host_bytes]
    if not roomy:
        largest = max(worker.host_bytes for worker in able)
        return _too_small("host memory", job.required_host_bytes, largest)
    if any(w.device_class == "cpu" or w.gpu_bytes >= job.required_gpu_bytes for w in roomy):
        return None
    return _too_small("GPU memory", job.required_gpu_bytes, max(worker.gpu_bytes for worker in roomy))


def quota_obstacle(running: int, max_running: int) -> Obstacle | None:
    """What keeps a job waiting until another one of its project has ended; None where one more may run."""
    if running < max_running:
        return None
    message = f"{running} jobs of the project run, and {max_running} may at once."
    return Obstacle(code="quota_running", message=message)


def postponed_obstacle(postponed: Postponed) -> Obstacle:
    """What keeps a job waiting whose last attempt was postponed."""
    message = f"{postponed.error_message} It is tried again at {postponed.available_at:%H:%M:%S} UTC."
    return Obstacle.model_validate({"code": postponed.error_code, "message": message})


def _too_small(what: str, needed: int, largest: int) -> Obstacle:
    message = (
        f"The job needs {needed / _GIB:.1f} GiB of {what}; the largest worker has {largest / _GIB:.1f} GiB."
    )
    return Obstacle(code="unschedulable", message=message)
