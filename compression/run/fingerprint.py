"""What makes two runs the same work, and what makes them the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compression.boundary import foreign
from compression.machine.arithmetic import Arithmetic
from compression.planning.plans import Plan
from compression.version import VERSION


def source_digests(plan: Plan) -> dict[str, str]:
    """sha256 of every weight file and of config.json, by name."""
    checkpoint = plan.checkpoint
    files = dict(zip(checkpoint.weight_names, checkpoint.weight_files, strict=True))
    files["config.json"] = checkpoint.folder / "config.json"
    return {name: _digest(path) for name, path in files.items()}


def resolve(
    plan: Plan, digests: dict[str, str], dataset_digest: str | None, arithmetic: Arithmetic
) -> dict[str, Any]:
    """The journal's header: {"type": "plan", "work_key", "fingerprint", "resolved"}.

    work_key = sha256(model digests, dataset identity, canonical recipe, engine version): the same work.
    fingerprint = sha256(resolved plan): the same bytes.
    """
    work = {
        "model": digests,
        "dataset": dataset_digest,
        "recipe": json.loads(plan.recipe.canonical_json()),
        "calibration": plan.calibration.model_dump(mode="json"),
        "evaluation": plan.evaluation.model_dump(mode="json"),
        "engine": VERSION,
    }
    resolved = {**work, "arithmetic": arithmetic.to_dict()}
    return {"type": "plan", "work_key": _hash(work), "fingerprint": _hash(resolved), "resolved": resolved}


def _hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(path: Path) -> str:
    with foreign("source_unreadable", f"{path.name} cannot be read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
