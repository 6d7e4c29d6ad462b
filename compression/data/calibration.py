"""Text into token blocks: what the compression learns from, and what it is measured on.

    documents ──shuffle(seed)──▶ d7 d2 │ d9 d4 d1 d8 ...
                                 held  │ calibration
                                 out   │
    tokens     d7 d7 d7 d2 d2 ▏▏ d9 d9 d9 d4 d1 d1 ▏▏      one stream each: no block holds tokens of both
    blocks     [   ][   ] drop   [   ][   ][   ] drop      of max_seq_length tokens

The same dataset, tokenizer and settings give the same blocks on every machine, in every process.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from compression.boundary import foreign, parse_json, reason
from compression.data.documents import Documents, open_documents
from compression.data.tokenizer import LONGEST_PART, RowRefused, TextTokenizer, load_tokenizer
from compression.errors import Problem, SourceError
from compression.recipe import Calibration, DatasetSpec, Evaluation
from compression.report import DataReport

_BATCH_CHARACTERS = 1 << 20
"""Text that is tokenized in one call; bounds memory, and changes no result."""

_SHORTEST_ROW = 2
"""Tokens below which a row predicts nothing."""

_BLOCKS_TO_DRAW_FROM = 16
"""Of a single document, times as many as are needed: no more of it is tokenized."""

_FEWEST_ROWS = 100
"""Rows whose share is taken where fewer were read: a bad one among the first few says nothing of the rest."""
_NAMED_ROWS = 5
"""Dropped rows that a message names."""


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids, each block int64 [tokens]: max_seq_length of them, or fewer without packing.

    split: "documents" where the held-out text shares no document with the calibration's, "blocks" where they
    share one, as the rest would not have been enough, so that only the blocks differ. warnings: rows that
    were dropped.
    """

    calibration: tuple[Tensor, ...]
    evaluation: tuple[Tensor, ...]
    split: str
    report: DataReport
    warnings: tuple[Problem, ...] = ()


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
    Documents are tokenized only until there are enough blocks, long ones in parts; `report` counts those
    documents, and as dropped those of their tokens that no block holds. Where there is a single document,
    blocks are drawn from its first, 16 times as many as are needed. Of the last document that is held
    out, what no held-out block holds serves the calibration only where all others are too short for it. A
    document that has no tokens is dropped, up to calibration.max_dropped_share of them.
    `calibrate=False` is for recipes that need no data: the dataset then serves the evaluation alone.

    Raises SourceError: what `open_documents`, `load_tokenizer` and `TextTokenizer` raise, and
    tokenizer_mismatch, dataset_invalid, dataset_too_small.
    """
    documents = open_documents(dataset)
    tokenizer = TextTokenizer(load_tokenizer(source))
    for_calibration = calibration.num_calibration_samples if calibrate else 0
    for_evaluation = evaluation.samples(calibration)
    order = list(range(len(documents)))
    generator = random.Random(calibration.seed)
    generator.shuffle(order)

    dropped = _Dropped(documents, calibration.max_dropped_share)
    cutter = _Cutter(
        _tokenized(documents, order, tokenizer, dropped), calibration.max_seq_length, calibration.packing
    )
    split = "documents" if len(documents) > 1 else "blocks"
    if len(documents) > 1:
        held_out = cutter.take(for_evaluation)
        rest_of_last = cutter.rest
        learned = cutter.take(for_calibration)
        if len(learned) < for_calibration and (more := rest_of_last.take(for_calibration - len(learned))):
            learned, split = [*learned, *more], "blocks"
    else:
        blocks = cutter.take(_BLOCKS_TO_DRAW_FROM * (for_evaluation + for_calibration))
        generator.shuffle(blocks)
        held_out, learned = blocks[:for_evaluation], blocks[for_evaluation:][:for_calibration]

    dropped.check(cutter.documents)
    if len(held_out) < for_evaluation or len(learned) < for_calibration:
        raise _too_small(calibration, len(held_out) + len(learned), for_calibration, for_evaluation)
    _check_vocabulary([*held_out, *learned], source)
    used = sum(len(block) for block in [*held_out, *learned])
    return TokenBlocks(
        calibration=tuple(learned),
        evaluation=tuple(held_out),
        split=split,
        report=DataReport(
            documents=cutter.documents,
            samples=len(learned),
            tokens_used=used,
            tokens_dropped=cutter.tokens - used,
            documents_dropped=dropped.count,
        ),
        warnings=dropped.warnings(cutter.documents),
    )


class _Cutter:
    """Cuts a stream of documents, each the token ids of its parts, into blocks; counts what it draws."""

    def __init__(self, stream: Iterator[Iterator[list[int]]], length: int, packing: bool) -> None:
        self._stream = stream
        self._length = length
        self._packing = packing
        self.documents = 0
        self.tokens = 0
        self.rest = _Rest(self, [], iter(()))

    def take(self, count: int | None) -> list[Tensor]:
        """The next `count` blocks (all that are left for None, fewer at the end of the stream).

        It ends in the middle of a document, of which `rest` is what is left; no later call gives that.
        """
        blocks: list[Tensor] = []
        self.rest = _Rest(self, [], iter(()))
        while count is None or len(blocks) < count:
            parts = next(self._stream, None)
            if parts is None:
                break
            self.documents += 1
            if self._packing:
                self.rest = _Rest(self, self.rest.tokens, parts)
                blocks += self.rest.take(None if count is None else count - len(blocks))
            else:
                blocks += self._row(parts)
        return blocks

    def _row(self, parts: Iterator[list[int]]) -> list[Tensor]:
        row: list[int] = []
        while len(row) < self._length and (part := self.counted(parts)) is not None:
            row += part
        return [_block(row[: self._length])] if len(row) >= _SHORTEST_ROW else []

    def counted(self, parts: Iterator[list[int]]) -> list[int] | None:
        """The next part of a document, None at its end."""
        part = next(parts, None)
        self.tokens += len(part or ())
        return part

    def whole_blocks(self, tokens: list[int], count: int | None) -> list[Tensor]:
        """At most `count` blocks from the beginning of `tokens`, which lose them."""
        whole = len(tokens) // self._length
        taken = whole if count is None else min(whole, count)
        begins = range(0, taken * self._length, self._length)
        blocks = [_block(tokens[begin : begin + self._length]) for begin in begins]
        del tokens[: taken * self._length]
        return blocks


@dataclass
class _Rest:
    """What is left of a document from which blocks are cut: tokens, and parts that have none yet."""

    cutter: _Cutter
    tokens: list[int]
    parts: Iterator[list[int]]

    def take(self, count: int | None) -> list[Tensor]:
        """The next `count` blocks of it, all for None, fewer at its end."""
        blocks = self.cutter.whole_blocks(self.tokens, count)
        while count is None or len(blocks) < count:
            part = self.cutter.counted(self.parts)
            if part is None:
                break
            self.tokens += part
            blocks += self.cutter.whole_blocks(self.tokens, None if count is None else count - len(blocks))
        return blocks


def _block(tokens: Sequence[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


@dataclass
class _Dropped:
    """The documents that have no tokens, and whether they are too many.

    begun: how many of them had some, of which blocks were cut, before the tokenizer failed.
    """

    documents: Documents
    max_share: float
    rows: list[str] = field(default_factory=list)
    first: str = ""
    count: int = 0
    begun: int = 0

    def add(self, index: int, why: str, *, begun: bool = False) -> None:
        """Drop a document. Raises SourceError `dataset_invalid` where no number of good ones could make up
        for those that were dropped."""
        self.count += 1
        self.begun += begun
        self.first = self.first or why
        if len(self.rows) < _NAMED_ROWS:
            self.rows.append(self.documents.where(index))
        if self.count > self.max_share * len(self.documents):
            raise self._too_many(f"{self.count} of {len(self.documents)} rows")

    def check(self, used: int) -> None:
        """Raises SourceError: `dataset_invalid`. used: documents that were drawn, those begun included."""
        of = max(self._read(used), min(_FEWEST_ROWS, len(self.documents)))
        if self.count > self.max_share * of:
            raise self._too_many(f"{self.count} of {self._read(used)} rows that were read")

    def warnings(self, used: int) -> tuple[Problem, ...]:
        """What the run has to tell: which rows it did without."""
        if not self.count:
            return ()
        message = (
            f"{self.count} of {self._read(used)} rows that were read have no tokens and were dropped: "
            f"{self._named()}."
        )
        return (Problem("rows_dropped", message, "Mend or remove them.", "/dataset"),)

    def _too_many(self, which: str) -> SourceError:
        return SourceError(
            "dataset_invalid",
            f"{which} have no tokens, more than max_dropped_share {self.max_share:g} allows: "
            f"{self._named()}.",
            "Mend or remove these rows, or raise the calibration's max_dropped_share.",
        )

    def _read(self, used: int) -> int:
        return used + self.count - self.begun

    def _named(self) -> str:
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        return f"{', '.join(self.rows)}{more}; the first, as {self.first}"


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
    documents: Documents, order: Sequence[int], tokenizer: TextTokenizer, dropped: _Dropped
) -> Iterator[Iterator[list[int]]]:
    """Token ids of each document, in `order`, tokenized some at a time; a long one part by part."""
    batch: list[tuple[int, str]] = []
    characters = 0
    for index in order:
        document = documents[index]
        special = isinstance(document, str)  # a chat template writes its own
        try:
            text = tokenizer.text_of(document)
        except RowRefused as refusal:
            dropped.add(index, str(refusal))
            continue
        if len(text) > LONGEST_PART:
            yield from _encoded(batch, tokenizer, dropped, special=special)
            batch, characters = [], 0
            parts = tokenizer.encode_long(text, special=special)
            try:
                begun = [next(parts), next(parts)]  # what a tokenizer adds, and the first part of the text
            except SourceError as error:
                dropped.add(index, _failing(error))
            else:
                yield _until_it_fails(index, chain(begun, parts), dropped)
            continue
        batch.append((index, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield from _encoded(batch, tokenizer, dropped, special=special)
            batch, characters = [], 0
    if batch:
        yield from _encoded(batch, tokenizer, dropped, special=special)


def _encoded(
    batch: Sequence[tuple[int, str]], tokenizer: TextTokenizer, dropped: _Dropped, *, special: bool
) -> Iterator[Iterator[list[int]]]:
    """The batch in one call; where that fails, one by one, to find the text that it fails on."""
    if not batch:
        return
    try:
        whole = tokenizer.encode([text for _, text in batch], special=special)
    except SourceError:
        for index, text in batch:
            try:
                yield iter(tokenizer.encode([text], special=special))
            except SourceError as error:
                dropped.add(index, _failing(error))
        return
    yield from (iter([ids]) for ids in whole)


def _until_it_fails(index: int, parts: Iterator[list[int]], dropped: _Dropped) -> Iterator[list[int]]:
    """The parts of a long document before one that the tokenizer fails on; the rest of it is dropped."""
    try:
        yield from parts
    except SourceError as error:
        dropped.add(index, _failing(error), begun=True)


def _failing(error: SourceError) -> str:
    return f"the tokenizer fails on it: {reason(error.__cause__ or error)}"


def _check_vocabulary(blocks: Iterable[Tensor], source: Path) -> None:
    """A token id that the embedding has no row for would crash the forward pass without a name."""
    what, hint = "config.json cannot be read", "Download the model again."
    with foreign("config_invalid", what, hint):
        config = parse_json((source / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise SourceError("config_invalid", f"{what}: it is no object.", hint)
    part = config.get("text_config")
    vocabulary = (part if part and isinstance(part, dict) else config).get("vocab_size")
    largest = max((int(block.max()) for block in blocks), default=0)
    if isinstance(vocabulary, int) and largest >= vocabulary:
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
