"""Models with outliers, and what they compute once all scales are folded and nothing is rounded."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compression import Calibration, DatasetSpec, Evaluation, Recipe, plan
from compression.data.calibration import load_blocks
from compression.machine import arithmetic as machine
from compression.machine.clock import Clock
from compression.math.gram import accumulate_gram
from compression.model.activations import Activations
from compression.model.fold import fold, fold_linears
from compression.model.streamed import StreamedModel
from compression.planning.plans import Plan
from compression.report import EvaluationReport

SMALL = Calibration(num_calibration_samples=8, max_seq_length=64)
FEW = Evaluation(num_samples=8)


def with_outliers(folder: Path) -> Path:
    """Three channels of what every group reads become 30 times larger, as in trained models."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight", "v_proj.weight")):
            tensor[[3, 70, 100]] *= 30
        if name.endswith("up_proj.weight"):
            tensor[[5, 80, 200]] *= 30
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def planned(source: Path, texts: Path, steps: list[dict[str, Any]]) -> Plan:
    recipe, dataset = Recipe.model_validate(steps), DatasetSpec(path=str(texts))
    return plan(source, recipe, dataset=dataset, calibration=SMALL, evaluation=FEW)


@torch.no_grad()
def folded_only(made: Plan, texts: Path) -> tuple[EvaluationReport, set[str]]:
    """The model after all folds, nothing rounded, against the original; and the groups that were folded."""
    model = StreamedModel(made.checkpoint, made.layers_prefix, device="cpu", compute_dtype=torch.float32)
    blocks = load_blocks(DatasetSpec(path=str(texts)), made.source, SMALL, FEW, calibrate=True)
    arithmetic = machine.choose("cpu", "F32")
    done = set()
    with closing(Activations(made, model, blocks, arithmetic, Path(), Clock())) as streams:
        for layer in made.layers:
            model.load_layer(layer.index)
            streams.pass_original(layer.index)
            folds = fold_linears(layer, model, streams, made.recipe)
            done |= folds.groups
            for group in streams.groups(layer):
                names = [module.name for module in group.modules]
                weights = [folds.weights.get(n, w) for n, w in zip(names, model.weights(names), strict=True)]
                if here := layer.folds.get(group.name):
                    assert group.inputs is not None
                    gram = accumulate_gram(group.inputs)
                    folded = fold(here, group, weights, gram, model, streams, made.recipe)
                    weights, done = folded.weights, done | ({group.name} if folded.done else set())
                model.set_weights(dict(zip(names, weights, strict=True)))
            streams.pass_calibration(layer)
            streams.pass_compressed(layer, {})
            model.drop_layer(layer.index)
        measured = streams.compare()
    assert measured is not None
    return measured, done
