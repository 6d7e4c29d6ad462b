"""As many rows of a dataset on the Hub as a job needs, kept as a .jsonl file under HF_HOME.

Rows are streamed from the beginning of the split: a dataset of terabytes costs what its first rows cost. The
file's name says of which commit it is and how much it holds, so that a later run takes it as it is, with or
without a network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.boundary import foreign, parse_json, writing
from compression.data.columns import Document
from compression.data.hub_streaming import HubDataset, stream_documents
from compression.errors import SourceError
from compression.hub.client import HubClient
from compression.hub.environment import HubEnvironment
from compression.hub.references import HubRef
from compression.hub.snapshots import cached_commit, remember_ref
from compression.recipe import Calibration, DatasetSpec, Evaluation

CHARACTERS_PER_TOKEN = 16
"""Text that is fetched for a token that is needed. A token is 2 to 6 characters: documents are drawn
from more than twice what is used."""
ROWS_PER_SAMPLE = 2
"""Rows that are fetched for a sample that is needed, without packing."""

OnRows = Callable[[int], None]
"""Called with the count of rows so far. What it raises ends the streaming."""


@dataclass(frozen=True)
class _Amount:
    """When there is enough: so many rows, or so many characters."""

    rows: int | None
    characters: int | None

    @classmethod
    def of(cls, calibration: Calibration, evaluation: Evaluation) -> _Amount:
        samples = calibration.num_calibration_samples + evaluation.samples(calibration)
        if not calibration.packing:
            return cls(ROWS_PER_SAMPLE * samples, None)
        return cls(None, CHARACTERS_PER_TOKEN * calibration.max_seq_length * samples)

    def reached(self, rows: int, characters: int) -> bool:
        if self.rows is not None:
            return rows >= self.rows
        assert self.characters is not None
        return characters >= self.characters and rows > 1


def fetch_rows(
    spec: DatasetSpec,
    calibration: Calibration,
    evaluation: Evaluation,
    environment: HubEnvironment,
    on_rows: OnRows,
) -> tuple[DatasetSpec, HubRef]:
    """The dataset as a local file, and the commit that it is of.

    Raises SourceError: hub_offline, dataset_config_not_found, dataset_split_not_found, dataset_invalid,
    dataset_empty, text_column_missing, dataset_format_unsupported, and what HubClient raises.
    """
    asked = HubDataset.of(spec)
    amount = _Amount.of(calibration, evaluation)
    if environment.offline:
        commit = cached_commit("dataset", asked.ref, environment)
    else:
        with HubClient(environment) as client:
            commit = client.commit("dataset", asked.ref).ref.revision
    pinned = dataclasses.replace(asked, ref=asked.ref.at(commit))
    path = _place(pinned, amount, environment)
    if not path.exists():
        if environment.offline:
            raise _not_cached(asked)
        _save(path, _enough(stream_documents(pinned, environment), amount, on_rows))
        remember_ref("dataset", asked.ref, commit, environment)
    column = _column(path)
    return DatasetSpec.model_validate({"path": str(path), f"{column}_column": column}), pinned.ref


def _column(path: Path) -> str:
    """What the rows that are kept hold, "text" or "messages"."""
    what, hint = f"{path} cannot be read", "Remove this file, which is a copy, and try again."
    with foreign("dataset_invalid", what, hint), path.open("rb") as file:
        row = parse_json(file.readline())
    if not isinstance(row, dict) or len(row) != 1:
        raise SourceError("dataset_invalid", f"{what}: its first row is no object with one key.", hint)
    return str(next(iter(row)))


def _place(dataset: HubDataset, amount: _Amount, environment: HubEnvironment) -> Path:
    """The file for these rows: everything that decides them is in its name."""
    canonical = json.dumps([dataclasses.asdict(dataset), dataclasses.asdict(amount)], sort_keys=True)
    key = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    owner, _, name = dataset.ref.id.partition("/")
    return (
        environment.home / "bitmill" / "datasets" / f"{owner}--{name}" / dataset.ref.revision / f"{key}.jsonl"
    )


def _save(path: Path, documents: Iterable[Document]) -> None:
    """One document a line; the file appears whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, building = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            for document in documents:
                column = "text" if isinstance(document, str) else "messages"
                with foreign("dataset_invalid", "A row of the dataset is not text"):
                    line = json.dumps({column: document}) + "\n"
                with writing(path):
                    file.write(line)
            if not file.tell():
                raise SourceError(
                    "dataset_empty", "The dataset holds no text.", "Use another split or column."
                )
        with writing(path):
            os.replace(building, path)
    finally:
        Path(building).unlink(missing_ok=True)


def _enough(documents: Iterator[Document], amount: _Amount, on_rows: OnRows) -> Iterator[Document]:
    characters = 0
    for rows, document in enumerate(documents, 1):
        yield document
        characters += len(document) if isinstance(document, str) else _length(document)
        on_rows(rows)
        if amount.reached(rows, characters):
            return


def _length(messages: list[dict[str, Any]]) -> int:
    return sum(len(text) for message in messages for text in message.values() if isinstance(text, str))


def _not_cached(asked: HubDataset) -> SourceError:
    return SourceError(
        "hub_offline",
        f"These rows of {str(asked.ref)!r} are not in the cache, and HF_HUB_OFFLINE forbids to fetch them.",
        "Run the same job once with a network and the same HF_HOME, or use a local file.",
    )
