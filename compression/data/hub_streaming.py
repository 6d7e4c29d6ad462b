"""The documents of a dataset on the Hub, from the first row of a split on. No code of a dataset is run."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compression.boundary import foreign
from compression.data.columns import Column, Document, without_nulls
from compression.errors import SourceError
from compression.hub.client import access_denied, unreachable
from compression.hub.environment import HubEnvironment
from compression.hub.presets import PRESETS, DatasetPreset
from compression.hub.references import DEFAULT_REVISION, HubRef
from compression.recipe import DatasetSpec


@dataclass(frozen=True)
class HubDataset:
    """What is read of a dataset on the Hub: a DatasetSpec with the preset's defaults filled in."""

    ref: HubRef
    config: str | None
    split: str
    text_column: str | None
    messages_column: str | None
    templates: tuple[str, ...]

    @classmethod
    def of(cls, spec: DatasetSpec) -> HubDataset:
        """Raises ValueError where `hub` can be nothing on the Hub; DatasetSpec has seen to that."""
        assert spec.hub is not None
        name, _, revision = spec.hub.partition("@")
        by_id = {preset.id: preset for preset in PRESETS.values()}
        preset = PRESETS.get(name) or by_id.get(name) or DatasetPreset(name, "train")
        ref = HubRef.parse(f"{preset.id}@{revision or DEFAULT_REVISION}")
        if ref is None:
            raise ValueError(f"{spec.hub!r} is no dataset on the Hub")
        own_column = spec.text_column is not None or spec.messages_column is not None
        columns = spec if own_column else preset
        return cls(
            ref=ref,
            config=spec.config or preset.config,
            split=spec.split or preset.split,
            text_column=columns.text_column,
            messages_column=columns.messages_column,
            templates=() if own_column else preset.templates,
        )


def stream_documents(dataset: HubDataset, environment: HubEnvironment) -> Iterator[Document]:
    """The documents that are not empty, from the first row on."""
    column = Column(dataset.text_column, dataset.messages_column)
    for number, row in enumerate(_stream(dataset, environment), 1):
        where = f"Row {number}"
        if dataset.templates:
            document: Document | None = _written(row, dataset.templates, where)
        else:
            name = column.choose(row, where)
            document = column.document({**row, name: without_nulls(row[name])}, where)
        if document is not None:
            yield document


def _written(row: Mapping[str, Any], templates: tuple[str, ...], where: str) -> str | None:
    """The row in the first template that it can fill."""
    for template in templates:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        absent = [name for name in names if name not in row]
        if absent:
            raise SourceError(
                "text_column_missing",
                f"{where} of the dataset has no column {absent[0]!r}; it has {', '.join(map(repr, row))}.",
                "Name the column with text_column, or messages_column for conversations.",
            )
        if all(isinstance(row[name], str) and row[name].strip() for name in names):
            return template.format(**{name: row[name] for name in names})
    return None


def _stream(dataset: HubDataset, environment: HubEnvironment) -> Iterator[dict[str, Any]]:
    """Rows as the library `datasets` streams them: it knows every layout and format there is on the Hub."""
    import datasets
    from httpx2 import HTTPError  # what huggingface_hub raises is of this class

    datasets.disable_progress_bars()
    unreadable = f"A file of {dataset.ref.id!r} cannot be read"
    with foreign("dataset_invalid", unreadable, "Use another dataset."):
        try:
            builder = datasets.load_dataset_builder(
                dataset.ref.id,
                dataset.config,
                revision=dataset.ref.revision,
                token=environment.token or False,
            )
        except ValueError as error:
            raise SourceError(
                "dataset_config_not_found",
                f"{dataset.ref.id!r} cannot be read with config {dataset.config!r}: {_first_lines(error)}",
                "Name one of its configs with config.",
            ) from None
        except (RuntimeError, datasets.exceptions.DataFilesNotFoundError) as error:  # of the first, a script
            raise _no_format(dataset, error) from None
        except datasets.exceptions.DatasetNotFoundError:  # it is there, as its commit is known
            raise access_denied("dataset", dataset.ref) from None
        except (OSError, HTTPError) as error:
            raise unreachable(f"{dataset.ref.id!r} broke off ({type(error).__name__})") from error
        try:
            rows = builder.as_streaming_dataset(split=dataset.split)
        except ValueError as error:
            raise SourceError(
                "dataset_split_not_found",
                f"{dataset.ref.id!r} has no split {dataset.split!r}: {_first_lines(error)}",
                "Name one of its splits with split.",
            ) from None
        try:
            yield from rows
        except (OSError, HTTPError) as error:
            raise unreachable(f"{dataset.ref.id!r} broke off ({type(error).__name__})") from error


def _no_format(dataset: HubDataset, error: Exception) -> SourceError:
    return SourceError(
        "dataset_format_unsupported",
        f"{dataset.ref.id!r} has no files of rows: {_first_lines(error)}",
        "Use a dataset of parquet, json, csv or text files: no code of a dataset is ever run.",
    )


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
