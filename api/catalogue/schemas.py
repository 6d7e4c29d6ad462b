"""What the catalogue routes answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _FromAttributes(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class MethodRead(_FromAttributes):
    """A type of step of a recipe."""

    name: str = Field(examples=["gptq"])
    aliases: list[str] = Field(examples=[["GPTQModifier"]])
    description: str
    needs_calibration: bool
    composes_with: list[str] = Field(description="Methods that may stand in the same recipe.")
    recovery: str = Field(description="How much accuracy it keeps, and at what cost.")
    source: str = Field(description="The paper; empty where there is none.")


class MethodList(BaseModel):
    """All methods."""

    items: list[MethodRead]


class SchemeRead(_FromAttributes):
    """A representation of weights and activations."""

    name: str = Field(examples=["W4A16"])
    aliases: list[str]
    description: str
    weights: str
    activations: str
    format: str = Field(description="Of compressed-tensors.", examples=["pack-quantized"])
    needs_calibration: bool = Field(description="Whether it needs data whatever the method.")
    composes_with: list[str] = Field(description="Methods that make it, or may go before those.")
    recovery: str = Field(description="What it keeps, and what it saves.")


class SchemeList(BaseModel):
    """All schemes."""

    items: list[SchemeRead]


class DatasetKindRead(BaseModel):
    """A place that calibration text may come from."""

    kind: Literal["path", "hub", "s3", "texts", "self"]
    field: str = Field(description="Of a submission's dataset.", examples=["path"])
    description: str
    suffixes: list[str] = Field(description="Of files; empty where there are none.")
    limits: str
    available: bool = Field(description="Whether jobs on this server may name one.")
    note: str = Field(description="What is missing, or what of it alone is available; empty where all is.")


class NamedDatasetRead(BaseModel):
    """A dataset on the Hub that has a short name, and what is read of it unless a job says otherwise."""

    name: str = Field(examples=["ultrachat_200k"])
    hub: str = Field(examples=["HuggingFaceH4/ultrachat_200k"])
    config: str | None
    split: str
    columns: list[str] = Field(description="Those that hold the text.")
    chat_template: bool = Field(description="Whether the model's chat template makes text of the column.")
    template: str | None = Field(description="What makes text of several columns, with a name for each.")


class CalibrationParameter(BaseModel):
    """A field of `calibration`. least, most: null where it is no number, or has no such bound."""

    name: str = Field(examples=["num_calibration_samples"])
    default: bool | int | float
    least: int | float | None
    most: int | float | None


class DatasetList(BaseModel):
    """Kinds of datasets, those that have a short name, and how much of one is taken.

    columns: where text is looked for when no column is named, the first that is there.
    """

    items: list[DatasetKindRead]
    named: list[NamedDatasetRead]
    columns: list[str]
    calibration: list[CalibrationParameter]
