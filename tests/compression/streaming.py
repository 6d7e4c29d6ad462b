"""Batches through a model of which one layer is real at a time: what tests of the forward share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compression.model.batches import SuspendedBatches
from compression.model.hooks import ForwardHooks
from compression.model.streamed import StreamedModel
from compression.planning.planner import plan
from compression.planning.plans import Plan
from compression.recipe import Recipe


def empty(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    made = planned(folder)
    return StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=dtype)


def streamed(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    model = empty(folder, dtype)
    model.load_embeddings()
    return model


def planned(folder: Path) -> Plan:
    return plan(folder, Recipe.from_short("W4A16", method="rtn", has_dataset=False))


def hooks_of(model: StreamedModel, folder: Path) -> ForwardHooks:
    groups = {m.name: m.group for layer in planned(folder).layers for m in layer.modules}
    return ForwardHooks(model, groups, {})


def tokens(batch: int = 2, seq: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, seq), generator=torch.Generator().manual_seed(seed))


def through_all_layers(model: StreamedModel, stream: SuspendedBatches) -> list[Tensor]:
    for index in range(len(model)):
        model.load_layer(index)
        stream.run_through(index)
        model.drop_layer(index)
    model.load_head()
    return [logits for logits, _ in stream.finish()]


def logits_of(folder: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """What the engine computes for the original, in float32; the empty model is traced first, as in a run."""
    model = empty(folder)
    model.trace()
    model.load_embeddings()
    stream = SuspendedBatches(hooks_of(model, folder), batches, quantize_activations=False)
    return through_all_layers(model, stream)
