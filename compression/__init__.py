"""Bitmill's engine: compress a language model layer by layer, in bounded memory, and know how good it is.

    from compression import oneshot
    oneshot(model="path/to/model", dataset="data.jsonl", recipe=..., output_dir="out")

Names are imported when they are first used, so that a program which only plans never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compression.machine.host_memory import set_library_variables
from compression.version import VERSION as __version__

if TYPE_CHECKING:
    from compression.errors import (
        CompressionError,
        NumericalError,
        PlanError,
        Problem,
        ResourceError,
        SelfCheckError,
        SourceError,
        UnexpectedError,
    )
    from compression.methods import (
        AWQStep,
        GPTQStep,
        MagnitudeStep,
        RTNStep,
        SmoothQuantStep,
        SparseGPTStep,
        WandaStep,
    )
    from compression.modifiers import oneshot
    from compression.pipeline import compress
    from compression.planning.planner import plan
    from compression.planning.plans import Plan
    from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
    from compression.report import Report
    from compression.schemes import SCHEMES, Scheme, get_scheme

    AWQModifier = AWQStep
    GPTQModifier = GPTQStep
    QuantizationModifier = RTNStep
    SmoothQuantModifier = SmoothQuantStep
    SparseGPTModifier = SparseGPTStep
    WandaPruningModifier = WandaStep


set_library_variables()  # torch, which nothing has imported yet, reads them when it is first used

__all__ = [
    "SCHEMES",
    "AWQModifier",
    "AWQStep",
    "Calibration",
    "CompressionError",
    "DatasetSpec",
    "Evaluation",
    "GPTQModifier",
    "GPTQStep",
    "MagnitudeStep",
    "NumericalError",
    "Plan",
    "PlanError",
    "Problem",
    "QuantizationModifier",
    "RTNStep",
    "Recipe",
    "Report",
    "ResourceError",
    "Scheme",
    "SelfCheckError",
    "SmoothQuantModifier",
    "SmoothQuantStep",
    "SourceError",
    "SparseGPTModifier",
    "SparseGPTStep",
    "UnexpectedError",
    "WandaPruningModifier",
    "WandaStep",
    "__version__",
    "compress",
    "get_scheme",
    "oneshot",
    "plan",
]

_HOME = {
    "compression.errors": (
        "CompressionError", "NumericalError", "PlanError", "Problem", "ResourceError", "SelfCheckError",
        "SourceError", "UnexpectedError",
    ),
    "compression.modifiers": ("oneshot",),
    "compression.pipeline": ("compress",),
    "compression.planning.planner": ("plan",),
    "compression.planning.plans": ("Plan",),
    "compression.recipe": ("Calibration", "DatasetSpec", "Evaluation", "Recipe"),
    "compression.report": ("Report",),
    "compression.schemes": ("SCHEMES", "Scheme", "get_scheme"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name.endswith(("Step", "Modifier")):  # every method's, under our name and under LLM Compressor's
        steps = import_module("compression.methods").public_names()
        if name in steps:
            return steps[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
