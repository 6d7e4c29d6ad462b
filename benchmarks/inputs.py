"""What both sides of the benchmark read: the model, the calibration tokens, the held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.heldout import heldout_text
from cli.demo.data import make_demo_dataset
from cli.demo.model import make_demo_model
from compression.calibration import load_blocks
from compression.recipe import Calibration, DatasetSpec, Evaluation

GROUP_SIZE = 64
"""128 does not divide the model's hidden size, 576."""

HELDOUT_BLOCKS, HELDOUT_LENGTH = 32, 1024


@dataclass(frozen=True)
class Inputs:
    """Paths. calibration and heldout hold `input_ids`, int64 [blocks, tokens]."""

    model: Path
    dataset: Path
    calibration: Path
    heldout: Path
    samples: int = 64
    length: int = 512


def prepare(work: Path) -> Inputs:
    """Makes in `work` what is not there yet: the model, both texts and their tokens."""
    work.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(
        model=make_demo_model(work / "model", work / "downloads"),
        dataset=make_demo_dataset(work / "topics.jsonl"),
        calibration=work / "calibration.safetensors",
        heldout=work / "heldout.safetensors",
    )
    blocks = load_blocks(
        DatasetSpec(path=str(inputs.dataset), text_column="text"),
        inputs.model,
        Calibration(num_calibration_samples=inputs.samples, max_seq_length=inputs.length),
        Evaluation(enabled=False),
    )
    save_file({"input_ids": torch.stack(blocks.calibration)}, inputs.calibration)

    tokenizer = AutoTokenizer.from_pretrained(inputs.model, local_files_only=True)
    text = heldout_text(work / "downloads")
    ids = tokenizer(text, verbose=False)["input_ids"][: HELDOUT_BLOCKS * HELDOUT_LENGTH]
    tokens = torch.tensor(ids).reshape(HELDOUT_BLOCKS, HELDOUT_LENGTH)
    save_file({"input_ids": tokens}, inputs.heldout)
    return inputs
