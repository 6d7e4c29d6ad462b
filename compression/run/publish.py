"""From a working folder full of shards to a checkpoint that readers load: everything around the tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compression.checkpoint.writer import Shard, copy_file, write_file, write_index
from compression.errors import Problem
from compression.planning.loaded import NOT_LOADED
from compression.planning.plans import Plan
from compression.planning.served import NOT_SERVED
from compression.report import Report
from compression.run.config import written_config
from compression.run.journal import Journal
from compression.version import VERSION


def publish(plan: Plan, journal: Journal, shards: Sequence[Shard], report: Report, output_dir: Path) -> None:
    """Write config, index, card, recipe and report, copy the source's other files, and rename the folder.

    Raises:
        ResourceError: `disk_full`, `output_not_writable`; the working folder stays, and a next run goes on
            from it.
    """
    folder = journal.folder
    checkpoint = plan.checkpoint
    for name in checkpoint.other_files:
        copy_file(checkpoint, name, folder / name)
    if (checkpoint.folder / "README.md").exists():
        copy_file(checkpoint, "README.md", folder / "README.source.md")
    write_index(folder, shards)
    config = written_config(plan)
    write_file(folder / "config.json", _json(config))
    recipe = yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False)
    write_file(folder / "recipe.yaml", recipe.encode())
    write_file(folder / "README.md", _card(plan, report, quantized="quantization_config" in config).encode())
    write_file(folder / "bitmill.json", _json(_record(plan, journal, report)))
    journal.publish(output_dir)


def _record(plan: Plan, journal: Journal, report: Report) -> dict[str, Any]:
    """bitmill.json: what was planned, what came of it, and from what it was made."""
    return {
        "bitmill": VERSION,
        "plan": plan.to_dict(),
        "report": report.to_dict(),
        "provenance": journal.header,
    }


def _card(plan: Plan, report: Report, *, quantized: bool) -> str:
    """The model card: what this is, how good it is, how to run it."""
    methods = " + ".join(step.type.upper() for step in plan.recipe.steps)
    totals = report.totals
    lines = [
        f"# {plan.name}, compressed",
        "",
        f"{plan.architecture} compressed with {methods} to {plan.recipe.representation} by Bitmill "
        f"{VERSION}. {_format(plan, quantized=quantized)}",
        "",
        "| | original | compressed |",
        "| --- | --- | --- |",
        f"| weights | {totals.source_bytes / 1e6:,.1f} MB | {totals.output_bytes / 1e6:,.1f} MB |",
    ]
    if report.evaluation:
        measured = report.evaluation
        lines += [
            f"| perplexity, {measured.tokens:,} held-out tokens | {measured.perplexity_original:.3f} "
            f"| {measured.perplexity_compressed:.3f} |",
            f"| same most likely next token | | {measured.top1_agreement:.1%} |",
        ]
    if experts := [row for row in report.modules if row.tokens is not None]:
        starved = sum(row.tokens < row.shape[1] for row in experts if row.tokens is not None)
        lines += [
            "",
            f"{starved} of {len(experts)} expert modules saw fewer calibration tokens than they have "
            "columns, and were solved for tokens of other experts as well.",
        ]
    lines += [
        "",
        *_how_to_run(plan),
        "recipe.yaml holds the recipe, bitmill.json the plan and a report of every module. "
        "The card of the original model, if it had one, is README.source.md; its licence applies.",
        "",
    ]
    return "\n".join(lines)


def _format(plan: Plan, *, quantized: bool) -> str:
    """How it is stored, and which readers load it, as far as the plan knows."""
    how = (
        "It is in the compressed-tensors format" if quantized else "Its weights are stored as the original's"
    )
    names = [name for name, code in _READERS if not _warnings(plan, code)]
    loads = f"{' and '.join(names)} load{'' if len(names) > 1 else 's'} it"
    return f"{how}; {loads}." if names else f"{how}."


def _how_to_run(plan: Plan) -> list[str]:
    """By the first reader that takes it; and why another does not."""
    lines = []
    if not _warnings(plan, NOT_SERVED):
        lines += ["```", f"vllm serve ./{plan.name}", "```", ""]
    elif not _warnings(plan, NOT_LOADED):
        lines += ["```", f'AutoModelForCausalLM.from_pretrained("./{plan.name}")', "```", ""]
    for _, code in _READERS:
        for warning in _warnings(plan, code):
            lines += [f"{warning.message} {warning.hint}".strip(), ""]
    return lines


_READERS = (("vLLM", NOT_SERVED), ("Transformers", NOT_LOADED))


def _warnings(plan: Plan, code: str) -> list[Problem]:
    return [warning for warning in plan.warnings if warning.code == code]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
