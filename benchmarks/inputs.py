"""What both sides of a comparison read: a model, its calibration tokens, its held-out tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks import train_small
from benchmarks.heldout import heldout_text
from benchmarks.python_reference import write_python_reference
from cli.demo.model import make_demo_model
from compression.data.calibration import load_blocks
from compression.recipe import Calibration, DatasetSpec, Evaluation

GROUP_SIZE = 64
"""128 does not divide SmolLM2's hidden size, 576."""


@dataclass(frozen=True)
class Size:
    """How much of everything: calibration blocks, tokens a block, held-out tokens, steps of training."""

    samples: int = 64
    length: int = 512
    heldout_tokens: int = 32 * 1024
    steps: int = train_small.STEPS


@dataclass(frozen=True)
class Inputs:
    """Paths, and what of them is used. calibration and heldout hold `input_ids`, int64 [blocks, tokens]."""

    model: Path
    dataset: Path
    calibration: Path
    heldout: Path
    samples: int
    length: int


def prepare(work: Path, size: Size = Size()) -> Inputs:
    """SmolLM2-135M and both texts: makes in `work` what is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(
        model=make_demo_model(work / "model", work / "downloads"),
        dataset=write_python_reference(work / "topics.jsonl"),
        calibration=work / "calibration.safetensors",
        heldout=work / "heldout.safetensors",
        samples=size.samples,
        length=size.length,
    )
    _write_tokens(inputs, heldout_text(work / "downloads"), size.heldout_tokens, length=1024)
    return inputs


def prepare_small(work: Path, size: Size = Size(), *, experts: int = 0) -> Inputs:
    """The small model, trained unless it is in `work`, and two texts: of its training, and of that kind."""
    work.mkdir(parents=True, exist_ok=True)
    texts = train_small.read_texts(work / "downloads")
    inputs = Inputs(
        model=train_small.make(work / "model", texts, steps=size.steps, experts=experts),
        dataset=train_small.write_dataset(work / "texts.jsonl", texts),
        calibration=work / "calibration.safetensors",
        heldout=work / "heldout.safetensors",
        samples=size.samples,
        length=size.length,
    )
    _write_tokens(inputs, "\n".join(texts.heldout), size.heldout_tokens, length=train_small.LENGTH)
    return inputs


def _write_tokens(inputs: Inputs, heldout: str, heldout_tokens: int, *, length: int) -> None:
    """The blocks that Bitmill draws from the dataset by itself, for the peer; and held-out blocks."""
    drawn = load_blocks(
        DatasetSpec(path=str(inputs.dataset), text_column="text"),
        inputs.model,
        Calibration(num_calibration_samples=inputs.samples, max_seq_length=inputs.length),
        Evaluation(enabled=False),
    )
    save_file({"input_ids": torch.stack(drawn.calibration)}, inputs.calibration)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model, local_files_only=True)
    ids = tokenizer(heldout, verbose=False)["input_ids"][:heldout_tokens]
    save_file({"input_ids": torch.tensor(ids).reshape(-1, length)}, inputs.heldout)
