"""Text into token blocks: what the compression learns from, and what it is measured on.

    documents ──shuffle(seed)──▶ d7 d2 │ d9 d4 d1 d8 ...
                                 held  │ calibration
                                 out   │
    tokens     d7 d7 d7 d2 d2 ▏▏ d9 d9 d9 d4 d1 d1 ▏▏      one stream each: no block holds tokens of both
    blocks     [   ][   ] drop   [   ][   ][   ] drop      of max_seq_length tokens

The same dataset, tokenizer and settings give the same blocks on every machine, in every process.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compression.data.columns import Document, Messages
from compression.data.documents import dataset_digest, open_documents
from compression.errors import SourceError
from compression.recipe import Calibration, DatasetSpec, Evaluation
from compression.report import DataReport

__all__ = ["TokenBlocks", "dataset_digest", "load_blocks", "load_tokenizer"]

_BATCH_CHARACTERS = 1 << 20
"""Text that is tokenized in one call; bounds memory, and changes no result."""

_SHORTEST_ROW = 2
"""Tokens below which a row predicts nothing."""


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids, each block int64 [tokens]: max_seq_length of them, or fewer without packing.

    split: "documents" where the held-out text shares no document with the calibration's, "blocks" where there
    was only one document, so that only the blocks differ.
    """

    calibration: tuple[Tensor, ...]
    evaluation: tuple[Tensor, ...]
    split: str
    report: DataReport


def load_blocks(
    dataset: DatasetSpec,
    source: Path,
    calibration: Calibration,
    evaluation: Evaluation,
    *,
    calibrate: bool = True,
) -> TokenBlocks:
    """Draws documents in an order that the seed decides, first the held-out ones, and cuts them into blocks.

    A document's tokens are those the tokenizer in `source` gives, with the special tokens it adds to a text
    (a conversation: those of its chat template). With packing, documents follow one another without a gap.
    Documents are tokenized only until there are enough blocks; `report` counts those documents, and as
    dropped those of their tokens that no block holds. `calibrate=False` is for recipes that need no data: the
    dataset then serves the evaluation alone.

    Raises SourceError: what `open_documents` raises, and tokenizer_missing, tokenizer_mismatch,
    chat_template_missing, dataset_invalid, dataset_too_small.
    """
    documents = open_documents(dataset)
    tokenizer = load_tokenizer(source)
    for_calibration = calibration.num_calibration_samples if calibrate else 0
    for_evaluation = evaluation.samples(calibration)
    order = list(range(len(documents)))
    generator = random.Random(calibration.seed)
    generator.shuffle(order)

    cutter = _Cutter(_tokenized(documents, order, tokenizer), calibration.max_seq_length, calibration.packing)
    if len(documents) > 1:
        held_out = cutter.take(for_evaluation)
        learned = cutter.take(for_calibration)
    else:
        blocks = cutter.take(None)
        generator.shuffle(blocks)
        held_out, learned = blocks[:for_evaluation], blocks[for_evaluation:][:for_calibration]

    if len(held_out) < for_evaluation or len(learned) < for_calibration:
        raise _too_small(calibration, len(held_out) + len(learned), for_calibration, for_evaluation)
    _check_vocabulary([*held_out, *learned], source)
    used = sum(len(block) for block in [*held_out, *learned])
    return TokenBlocks(
        calibration=tuple(learned),
        evaluation=tuple(held_out),
        split="documents" if len(documents) > 1 else "blocks",
        report=DataReport(
            documents=cutter.documents,
            samples=len(learned),
            tokens_used=used,
            tokens_dropped=cutter.tokens - used,
        ),
    )


@dataclass
class _Cutter:
    """Cuts a stream of tokenized documents into blocks; counts what it draws."""

    stream: Iterator[list[int]]
    length: int
    packing: bool
    documents: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)

    def take(self, count: int | None) -> list[Tensor]:
        """The next `count` blocks (all that are left for None, fewer at the end of the stream).

        It ends in the middle of a document; what is left of that one is dropped, never given to a later call.
        """
        blocks: list[Tensor] = []
        pending: list[int] = []
        while count is None or len(blocks) < count:
            document = next(self.stream, None)
            if document is None:
                break
            self.documents += 1
            self.tokens += len(document)
            if self.packing:
                pending += document
                whole = len(pending) - len(pending) % self.length
                rows = [pending[begin : begin + self.length] for begin in range(0, whole, self.length)]
                del pending[:whole]
            else:
                rows = [document[: self.length]] if len(document) >= _SHORTEST_ROW else []
            blocks += [torch.tensor(row, dtype=torch.int64) for row in rows]
        return blocks if count is None else blocks[:count]


def make_batches(blocks: Sequence[Tensor], batch_tokens: int) -> list[Tensor]:
    """Stack consecutive blocks of equal length, int64 [seq], into batches of about `batch_tokens` tokens."""
    batches: list[Tensor] = []
    pending: list[Tensor] = []
    for block in blocks:
        fits = pending and len(block) == len(pending[0]) and (len(pending) + 1) * len(block) <= batch_tokens
        if pending and not fits:
            batches.append(torch.stack(pending))
            pending = []
        pending.append(block)
    if pending:
        batches.append(torch.stack(pending))
    return batches


def _tokenized(
    documents: Sequence[Document], order: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Token ids of each document, in `order`, tokenized some at a time."""
    batch: list[Document] = []
    characters = 0
    for position, index in enumerate(order, 1):
        document = documents[index]
        batch.append(document)
        characters += len(document) if isinstance(document, str) else sum(len(str(turn)) for turn in document)
        if characters >= _BATCH_CHARACTERS or position == len(order):
            yield from _encode(batch, tokenizer)
            batch, characters = [], 0


def _encode(batch: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = [item if isinstance(item, str) else _rendered(item, tokenizer) for item in batch]
    encoded = tokenizer(
        texts,
        add_special_tokens=isinstance(batch[0], str),  # a chat template writes its own
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # no warning that a document is longer than the model's context
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise SourceError(
            "chat_template_missing",
            "The dataset holds conversations and the model's tokenizer has no chat template.",
            "Use a dataset of plain text, or add chat_template.jinja to the model.",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise SourceError(
            "dataset_invalid", f"The model's chat template refuses a conversation: {error}."
        ) from None


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; no download, no code of the model's.

    Raises SourceError: tokenizer_missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "tokenizer_missing",
            f"No tokenizer could be read from {source}: {error}".splitlines()[0],
            "Put the model's tokenizer files beside its weights.",
        ) from None
    return tokenizer


def _check_vocabulary(blocks: Sequence[Tensor], source: Path) -> None:
    """A token id that the embedding has no row for would crash the forward pass without a name."""
    config = json.loads((source / "config.json").read_bytes())
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    largest = max((int(block.max()) for block in blocks), default=0)
    if vocabulary is not None and largest >= vocabulary:
        raise SourceError(
            "tokenizer_mismatch",
            f"The tokenizer gives token {largest}; the model's vocabulary ends at {vocabulary - 1}.",
            "Put the tokenizer that belongs to the model beside its weights.",
        )


def _too_small(
    calibration: Calibration, found: int, for_calibration: int, for_evaluation: int
) -> SourceError:
    unit = f"blocks of {calibration.max_seq_length} tokens" if calibration.packing else "documents"
    return SourceError(
        "dataset_too_small",
        f"The dataset gives {found} {unit}; {for_calibration} for calibration and {for_evaluation} for the "
        f"evaluation are needed.",
        "Give more text, or lower num_calibration_samples, max_seq_length or the evaluation's num_samples.",
    )
