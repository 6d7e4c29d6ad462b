"""The engine under the name that people know from LLM Compressor. Its modifiers: `compression.methods`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compression.boundary import foreign, reason
from compression.errors import SourceError
from compression.events import OnEvent
from compression.peer_recipe import load_recipe_yaml
from compression.pipeline import compress
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.report import Report


def oneshot(
    model: str | Path,
    dataset: str | dict[str, Any] | DatasetSpec | None,
    recipe: Recipe | Sequence[Any] | str | Path,
    output_dir: str | Path,
    max_seq_length: int = 2048,
    num_calibration_samples: int = 512,
    *,
    seed: int = 0,
    evaluation: Evaluation = Evaluation(),
    device: str = "auto",
    on_event: OnEvent | None = None,
) -> Report:
    """Compress `model` with `recipe` and write the checkpoint to `output_dir`: `compress` under known names.

    recipe: a Recipe, a list of steps (GPTQStep(scheme=...), ..., or mappings with a `type`), or a file with a
    recipe, Bitmill's or LLM Compressor's.

    Raises:
        pydantic.ValidationError: a recipe or dataset that is not well formed.
        CompressionError: as `compress`; `recipe_unreadable`, a recipe file that cannot be read.
    """
    if isinstance(recipe, str | Path):
        what = f"The recipe {recipe} cannot be read"
        with foreign("recipe_unreadable", what):
            text = Path(recipe).read_text(encoding="utf-8")
        try:
            document = load_recipe_yaml(text)
        except yaml.YAMLError as error:
            raise SourceError("recipe_unreadable", f"{what}: {reason(error)}.") from error
        recipe = Recipe.model_validate(document)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.model_validate({"steps": list(recipe)})
    return compress(
        model,
        recipe,
        output_dir,
        dataset=None if dataset is None else DatasetSpec.model_validate(dataset),
        calibration=Calibration(
            num_calibration_samples=num_calibration_samples, max_seq_length=max_seq_length, seed=seed
        ),
        evaluation=evaluation,
        device=device,
        on_event=on_event,
    )
