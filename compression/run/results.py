"""The report of a run that is about to be published."""

from __future__ import annotations

from collections.abc import Sequence

from compression.checkpoint.writer import Shard
from compression.data.calibration import TokenBlocks
from compression.machine import arithmetic as machine
from compression.machine.clock import Clock
from compression.planning.plans import Plan
from compression.report import EvaluationReport, ModuleReport, Report, Totals, dampening_warnings
from compression.run.journal import Journal


def make_report(
    plan: Plan,
    journal: Journal,
    shards: Sequence[Shard],
    rows: Sequence[ModuleReport],
    measured: EvaluationReport | None,
    blocks: TokenBlocks | None,
    clock: Clock,
    device: str,
) -> Report:
    """rows: of all linears, those of finished layers from the journal. blocks: None without a dataset.
    device: "cpu" or "cuda:N", where the run computed."""
    problems = (*plan.warnings, *(blocks.warnings if blocks else ()))
    return Report(
        work_key=journal.header["work_key"],
        fingerprint=journal.header["fingerprint"],
        totals=Totals(
            source_bytes=plan.checkpoint.weight_bytes,
            output_bytes=sum(shard.size for shard in shards),
            parameters=plan.parameters,
            compressed_parameters=plan.compressed_parameters,
            seconds=clock.total,
        ),
        modules=list(rows),
        evaluation=measured,
        data=None if blocks is None else blocks.report,
        phases=dict(clock.seconds),
        peak_host_bytes=machine.peak_host_bytes(),
        peak_gpu_bytes=machine.peak_device_bytes(device),
        bytes_may_differ=journal.header.get("bytes_may_differ", False),
        warnings=[
            *({"code": problem.code, "message": problem.message} for problem in problems),
            *dampening_warnings(rows),
        ],
    )
