"""The names of a checkpoint's tensors as Transformers has them, where files have others.

The engine speaks of modules as Transformers does, and so do a reader's `ignore` and targets; files keep the
names that they came with, which every tensor of the plan holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.tensors import StoredTensor
from compression.errors import PlanError, Problem
from compression.families.structure import Vision


def with_model_names(checkpoint: Checkpoint, vision: Vision) -> Checkpoint:
    """The checkpoint, its tensors by the names that they have in the model.

    Raises:
        PlanError: `index_invalid`, where two tensors are the same one of the model.
    """
    tensors: dict[str, StoredTensor] = {}
    for stored, info in checkpoint.tensors.items():
        other = tensors.setdefault(vision.in_model(stored), info)
        if other is not info:
            message = f"{other.name} and {stored} are two names of one tensor of the model."
            raise PlanError(Problem("index_invalid", message, "Leave out one of them.", "/model"))
    return replace(checkpoint, tensors=tensors)


def on_disk(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Tensors of the checkpoint by their names on disk."""
    infos = (checkpoint.tensors[name] for name in names)
    return {info.name: info for info in infos}


def module_names(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """The modules of tensors beside the decoder, by every name under which readers look for them: those that
    Transformers 5 has for them, and those on disk, which vLLM goes by."""
    both = (name for own in names for name in (own, checkpoint.tensors[own].name))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in both))
