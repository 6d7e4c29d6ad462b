"""What `bitmill submit` makes of its options, and what it says while a job is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.progress import sentence
from cli.request import BadOptions, JobOptions, body


def dataset(**options: Any) -> Any:
    return body(JobOptions(model="org/model@v1", **options)).get("dataset")


def test_a_model_on_the_hub_is_sent_as_it_is() -> None:
    assert body(JobOptions(model="org/model@v1")) == {"model": "org/model@v1"}


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"dataset": "c4"}, {"hub": "c4"}),
        (
            {"dataset": "org/data", "dataset_config": "en", "dataset_split": "test", "text_column": "body"},
            {"hub": "org/data", "config": "en", "split": "test", "text_column": "body"},
        ),
        ({"dataset": "texts.jsonl"}, {"path": "texts.jsonl"}),
        ({"dataset": "self"}, {"generated": True}),
        (
            {"dataset": "/data/chats.parquet", "messages_column": "m"},
            {"path": "/data/chats.parquet", "messages_column": "m"},
        ),
    ],
)
def test_datasets(options: dict[str, str], sent: dict[str, str]) -> None:
    assert dataset(**options) == sent


def test_what_is_required_of_the_result_is_sent() -> None:
    assert body(JobOptions(model="org/model", require="vllm"))["require"] == "vllm"


def test_what_is_strict_and_what_may_be_dropped_is_sent() -> None:
    sent = body(JobOptions(model="org/model", strict=True, max_dropped_share=0.1))
    assert (sent["strict"], sent["calibration"]) == (True, {"max_dropped_share": 0.1})


def test_a_file_that_is_here_is_a_file_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "data").write_text("words")
    monkeypatch.chdir(tmp_path)
    assert dataset(dataset="org/data") == {"path": str(tmp_path / "org" / "data")}


def test_parts_of_no_dataset_are_named() -> None:
    with pytest.raises(BadOptions, match="--dataset-config, --text-column describe a --dataset"):
        dataset(dataset_config="en", text_column="text")


def test_what_is_said_while_fetching() -> None:
    model = {"what": "model", "name": "org/model", "done": 1_200_000_000, "total": 13_500_000_000}
    rows = {"what": "dataset", "name": "c4", "done": 1234, "total": None}
    assert (
        sentence({"type": "fetch_progress", "data": model}) == "fetching model org/model: 1.20 GB of 13.5 GB"
    )
    assert sentence({"type": "fetch_progress", "data": rows}) == "fetching dataset c4: 1234 rows"
