"""A tokenizer of one token a byte, and what calibration makes of texts with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compression.data.calibration import TokenBlocks, load_blocks
from compression.errors import SourceError
from compression.recipe import Calibration, DatasetSpec, Evaluation
from tests.support.models import tiny_tokenizer

BOS = 256
OFF = Evaluation(enabled=False)


def make_source(folder: Path) -> Path:
    """All that calibration needs of a model: tokenizer and config."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    return folder


def tokens_of(text: str) -> list[int]:
    """The tiny tokenizer, once more: its ids follow the order of the alphabet GPT-2 maps bytes to."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    order = {byte: index for index, byte in enumerate(printable + rest)}
    assert len(order) == 256
    return [BOS, *(order[byte] for byte in text.encode())]


def load(source: Path, texts: list[str], evaluation: Evaluation = OFF, **settings: object) -> TokenBlocks:
    return load_blocks(
        DatasetSpec(texts=tuple(texts)), source, Calibration.model_validate(settings), evaluation
    )


def rows(path: Path, *documents: object) -> DatasetSpec:
    """A .jsonl file: texts, or conversations in the column `messages`."""
    lines = [{"text": d} if isinstance(d, str) else {"messages": d} for d in documents]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DatasetSpec(path=str(path))


def as_lists(blocks: tuple[torch.Tensor, ...]) -> list[list[int]]:
    return [block.tolist() for block in blocks]


def documents_of(blocks: tuple[torch.Tensor, ...], texts: list[str]) -> set[int]:
    """Which texts have tokens in the blocks: each text is made of a letter of its own."""
    found = {token for block in blocks for token in block.tolist()} - {BOS}
    return {index for index, text in enumerate(texts) if tokens_of(text)[1] in found}


def refused(source: Path, texts: list[str], evaluation: Evaluation = OFF, **settings: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        load(source, texts, evaluation, **settings)
    return caught.value
