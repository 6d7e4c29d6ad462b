"""What this server takes as datasets: what the engine reads, as far as the settings let jobs name it."""

from __future__ import annotations

import string
from collections.abc import Iterator

from api.catalogue.schemas import CalibrationParameter, DatasetKindRead, DatasetList, NamedDatasetRead
from api.settings import Settings
from compression.data.columns import KNOWN_COLUMNS
from compression.hub.environment import HubEnvironment
from compression.hub.presets import PRESETS, DatasetPreset
from compression.recipe import DATASET_SUFFIXES, Calibration

_SIZE = "Of any size: no more is read than is needed."


def datasets(settings: Settings, max_body_bytes: int) -> DatasetList:
    """All of it. max_body_bytes: of a request of the caller's."""
    return DatasetList(
        items=list(_kinds(settings, HubEnvironment.read(), max_body_bytes)),
        named=[_named(name, preset) for name, preset in PRESETS.items()],
        columns=list(KNOWN_COLUMNS),
        calibration=list(_calibration()),
    )


def _kinds(settings: Settings, hub: HubEnvironment, max_body_bytes: int) -> Iterator[DatasetKindRead]:
    suffixes = list(DATASET_SUFFIXES)
    yield DatasetKindRead(
        kind="path",
        field="path",
        description="A file below one of the server's local roots.",
        suffixes=suffixes,
        limits="Of any size.",
        available=bool(settings.local_roots),
        note="" if settings.local_roots else "The server has no BITMILL_LOCAL_ROOTS.",
    )
    yield DatasetKindRead(
        kind="hub",
        field="hub",
        description="A dataset on the Hugging Face Hub: a short name or owner/name, with config and split.",
        suffixes=[],
        limits=_SIZE,
        available=True,
        note="Only what is cached: the server has HF_HUB_OFFLINE." if hub.offline else "",
    )
    yield DatasetKindRead(
        kind="s3",
        field="s3",
        description="A file in S3, below one of the server's prefixes.",
        suffixes=suffixes,
        limits="Of any size.",
        available=bool(settings.s3_prefixes),
        note="" if settings.s3_prefixes else "The server has no BITMILL_S3_PREFIXES.",
    )
    yield DatasetKindRead(
        kind="texts",
        field="texts",
        description="The documents themselves, in the request.",
        suffixes=[],
        limits=f"A request has at most {max_body_bytes} bytes.",
        available=True,
        note="",
    )
    yield DatasetKindRead(
        kind="self",
        field="generated",
        description="Text that the model writes itself.",
        suffixes=[],
        limits="As much as the calibration takes.",
        available=True,
        note="",
    )


def _named(name: str, preset: DatasetPreset) -> NamedDatasetRead:
    template = preset.templates[0] if preset.templates else None
    column = preset.text_column or preset.messages_column
    return NamedDatasetRead(
        name=name,
        hub=preset.id,
        config=preset.config,
        split=preset.split,
        columns=_fields(template) if template else [column] if column else [],
        chat_template=preset.messages_column is not None,
        template=template,
    )


def _fields(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field]


def _calibration() -> Iterator[CalibrationParameter]:
    for name, schema in Calibration.model_json_schema()["properties"].items():
        below = schema.get("exclusiveMaximum")
        yield CalibrationParameter(
            name=name,
            default=schema["default"],
            least=schema.get("minimum"),
            most=schema.get("maximum") if below is None else below - 1,
        )
