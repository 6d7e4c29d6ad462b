"""Calibration datasets under the names people know, as data: where they are, and what of a row is text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetPreset:
    """Defaults for a dataset on the Hub, by its short name or its own.

    text_column or messages_column holds the documents; or they are written from several columns: templates,
    the first of which all columns have text for.
    """

    id: str
    split: str
    config: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    templates: tuple[str, ...] = ()


_ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request."
)

PRESETS: dict[str, DatasetPreset] = {
    "c4": DatasetPreset("allenai/c4", "train", config="en", text_column="text"),
    "open_platypus": DatasetPreset(
        "garage-bAInd/Open-Platypus",
        "train",
        templates=(
            _ALPACA.format(more=", paired with an input that provides further context")
            + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}",
            _ALPACA.format(more="") + "\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}",
        ),
    ),
    "ultrachat_200k": DatasetPreset("HuggingFaceH4/ultrachat_200k", "train_sft", messages_column="messages"),
    "wikitext": DatasetPreset("Salesforce/wikitext", "train", config="wikitext-2-raw-v1", text_column="text"),
}
"""open_platypus: written in the layout of Alpaca, as models are trained on it, and as LLM Compressor does;
ultrachat_200k: the model's own chat template; c4 and wikitext: plain text."""
