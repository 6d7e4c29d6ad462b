"""What the catalogue routes answer."""

from __future__ import annotations

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
