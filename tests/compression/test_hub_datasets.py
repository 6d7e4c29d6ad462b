"""Datasets from a Hub on this machine, streamed by the real library."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from compression.data.calibration import load_blocks
from compression.data.documents import Document, dataset_digest, open_documents
from compression.data.hub_rows import fetch_rows
from compression.errors import SourceError
from compression.hub.environment import HubEnvironment
from compression.hub.presets import PRESETS
from compression.recipe import Calibration, DatasetSpec, Evaluation
from tests.support.hub import Hub, online, running_hub
from tests.support.models import tiny_tokenizer

SMALL = Calibration(num_calibration_samples=2, max_seq_length=8)
OFF = Evaluation(enabled=False)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def parquet_bytes(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(columns), buffer)
    return buffer.getvalue()


def card(**data_files: str) -> bytes:
    """A README that says where each config's split is: config="split:pattern"."""
    lines = ["---", "configs:"]
    for config, told in data_files.items():
        split, pattern = told.split(":")
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", ""]).encode()


def c4_shard(number: int) -> bytes:
    rows = (json.dumps({"text": f"{number}-{row} " + "web " * 30, "url": "u"}) for row in range(2000))
    return gzip.compress("\n".join(rows).encode())


FILES: dict[str, dict[str, bytes]] = {
    "allenai/c4": {
        "README.md": card(en="train:en/c4-train.*.json.gz", de="train:multilingual/c4-de.*.json.gz"),
        **{f"en/c4-train.{shard:05d}-of-00003.json.gz": c4_shard(shard) for shard in range(3)},
    },
    "Salesforce/wikitext": {
        "README.md": card(
            **{"wikitext-2-raw-v1": "train:wikitext-2-raw-v1/train-*", "other": "train:other/*"}
        ),
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet_bytes(
            {"text": ["", " = Title = \n", " A paragraph of some length . \n" * 20, "", " The last . \n"]}
        ),
        "other/train.parquet": parquet_bytes({"text": ["other"]}),
    },
    "HuggingFaceH4/ultrachat_200k": {
        "README.md": card(default="train_sft:data/train_sft-*"),
        "data/train_sft-00000-of-00001.parquet": parquet_bytes(
            {"prompt": ["Hi", "Hi"], "prompt_id": ["a", "b"], "messages": [TURNS, TURNS * 2]}
        ),
    },
    "garage-bAInd/Open-Platypus": {
        "README.md": b"",
        "data/train-00000-of-00001.parquet": parquet_bytes(
            {"input": ["", "3, 4"], "output": ["Blue.", "7"], "instruction": ["A colour?", "Add these."]}
        ),
    },
    "someone/numbers": {"train.csv": b"number\n1\n2\n"},
    "someone/pictures": {"one.xyz": b"x"},
    "someone/broken": {"train.jsonl": b'{"text": "fine"}\n{"text": '},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with running_hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        online(monkeypatch, hub, tmp_path_factory.mktemp("huggingface"))
        for id, files in FILES.items():
            hub.add_dataset(id, files)
        hub.add_dataset("someone/gated", FILES["someone/numbers"], gated=True)
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> HubEnvironment:
    return HubEnvironment(hub.url, tmp_path, tmp_path / "hub", token=None, offline=False)


def fetch(environment: HubEnvironment, dataset: Any, calibration: Calibration = SMALL) -> DatasetSpec:
    spec = DatasetSpec.model_validate(dataset)
    return fetch_rows(spec, calibration, OFF, environment, lambda _: None)[0]


def documents(environment: HubEnvironment, dataset: Any, **settings: Any) -> list[Document]:
    found = fetch(environment, dataset, SMALL.model_copy(update=settings))
    return list(open_documents(found))


def refused(environment: HubEnvironment, dataset: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(environment, dataset)
    return caught.value


def test_wikitext_is_text(environment: HubEnvironment) -> None:
    found = documents(environment, "wikitext")
    assert found == [" = Title = \n", " A paragraph of some length . \n" * 20]


def test_ultrachat_is_conversations(environment: HubEnvironment) -> None:
    assert documents(environment, "ultrachat_200k") == [TURNS, TURNS * 2]
    assert documents(environment, {"hub": "ultrachat_200k", "text_column": "prompt"}) == ["Hi", "Hi"]


def test_ultrachat_goes_through_the_chat_template(environment: HubEnvironment, tiny_llama: Path) -> None:
    rows = SMALL.model_copy(update={"max_seq_length": 100, "packing": False})
    blocks = load_blocks(fetch(environment, "ultrachat_200k"), tiny_llama, rows, OFF)
    texts = {tiny_tokenizer().decode(block) for block in blocks.calibration}
    assert texts == {"[user]Hi\n[assistant]Hello\n", "[user]Hi\n[assistant]Hello\n" * 2}


def test_open_platypus_is_written_as_it_was_trained_on(environment: HubEnvironment) -> None:
    without, with_input = documents(environment, "open_platypus")
    assert isinstance(without, str)
    assert isinstance(with_input, str)
    assert without.startswith("Below is an instruction that describes a task. Write a response")
    assert without.endswith("### Instruction:\nA colour?\n\n### Response:\nBlue.")
    assert "paired with an input" in with_input
    assert with_input.endswith("### Instruction:\nAdd these.\n\n### Input:\n3, 4\n\n### Response:\n7")


def test_of_a_large_dataset_only_the_beginning_is_fetched(hub: Hub, environment: HubEnvironment) -> None:
    found = documents(environment, "c4")
    assert found[0] == "0-0 " + "web " * 30
    assert 1 < len(found) < 10
    shards = [name for name in hub.served if name.startswith("en/")]
    assert shards == ["en/c4-train.00000-of-00003.json.gz"]


def test_the_amount_follows_from_the_samples(environment: HubEnvironment) -> None:
    assert sum(map(len, documents(environment, "c4", num_calibration_samples=50))) >= 16 * 8 * 50
    assert len(documents(environment, "c4", num_calibration_samples=7, packing=False)) == 14


def test_a_config_a_split_and_a_revision(hub: Hub, environment: HubEnvironment) -> None:
    by_id = documents(environment, "HuggingFaceH4/ultrachat_200k@main")
    assert by_id == documents(environment, {"hub": "ultrachat_200k", "split": "train_sft"})
    spec = {"hub": "Salesforce/wikitext", "config": "other", "text_column": "text"}
    assert documents(environment, spec) == ["other"]
    commit = hub.repositories["datasets", "Salesforce/wikitext"].commit
    assert documents(environment, {"hub": f"wikitext@{commit}", "config": "other"}) == ["other"]


def test_the_commit_is_told_and_the_same_rows_are_the_same_dataset(
    hub: Hub, environment: HubEnvironment, tmp_path: Path
) -> None:
    spec = DatasetSpec(hub="wikitext")
    first, ref = fetch_rows(spec, SMALL, OFF, environment, lambda _: None)
    commit = hub.repositories["datasets", "Salesforce/wikitext"].commit
    assert (ref.id, ref.revision) == ("Salesforce/wikitext", commit)
    elsewhere = dataclasses.replace(environment, home=tmp_path / "elsewhere")
    assert dataset_digest(fetch(elsewhere, "wikitext")) == dataset_digest(first)
    assert dataset_digest(fetch(elsewhere, "c4")) != dataset_digest(first)


def test_fetched_rows_are_used_again_also_offline(hub: Hub, environment: HubEnvironment) -> None:
    offline = dataclasses.replace(environment, offline=True)
    assert refused(offline, "wikitext").code == "hub_offline"
    first = fetch(environment, "wikitext")
    served = hub.served.total()
    assert fetch(environment, "wikitext") == first
    assert hub.served.total() == served
    asked = hub.requests.total()
    assert fetch(offline, "wikitext") == first
    assert hub.requests.total() == asked
    more = SMALL.model_copy(update={"num_calibration_samples": 1000})
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        fetch(offline, "wikitext", more)


def test_whoever_waits_can_end_it_and_nothing_half_is_kept(environment: HubEnvironment) -> None:
    class Enough(Exception):
        pass

    def stop(rows: int) -> None:
        if rows == 3:
            raise Enough

    with pytest.raises(Enough):
        fetch_rows(DatasetSpec(hub="c4"), Calibration(), OFF, environment, stop)
    assert not [path for path in (environment.home / "bitmill").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("dataset", "code", "said"),
    [
        ("someone/nothing", "hub_repository_not_found", "someone/nothing"),
        ("wikitext@v9", "hub_revision_not_found", "v9"),
        ("someone/gated", "hub_access_denied", "someone/gated"),
        ({"hub": "allenai/c4", "config": "fr"}, "dataset_config_not_found", "en"),
        ({"hub": "wikitext", "split": "dev"}, "dataset_split_not_found", "train"),
        ({"hub": "wikitext", "text_column": "body"}, "text_column_missing", "'text'"),
        ({"hub": "wikitext", "messages_column": "text"}, "dataset_invalid", "Row 1"),
        ("someone/numbers", "text_column_missing", "'number'"),
        ({"hub": "someone/numbers", "text_column": "number"}, "dataset_invalid", "Row 1"),
        ("someone/pictures", "dataset_format_unsupported", "someone/pictures"),
        ("someone/broken", "dataset_invalid", "someone/broken"),
    ],
)
def test_refusals_say_what_there_is(environment: HubEnvironment, dataset: Any, code: str, said: str) -> None:
    error = refused(environment, dataset)
    assert error.code == code
    assert said in error.message


def test_nobody_answers(environment: HubEnvironment) -> None:
    closed = dataclasses.replace(environment, endpoint="http://127.0.0.1:9")
    assert refused(closed, "wikitext").code == "hub_unreachable"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("c4", "hub"),
        ("c4@main", "hub"),
        ("org/name", "hub"),
        ("org/texts.jsonl", "path"),
        ("texts.PARQUET", "path"),
        ("/data/c4", "path"),
        ("./org/name", "path"),
        ("my texts", "path"),
    ],
)
def test_what_a_string_is(text: str, field: str) -> None:
    assert getattr(DatasetSpec.model_validate(text), field) == text


@pytest.mark.parametrize(
    "fields",
    [
        {"hub": "c4", "path": "a.txt"},
        {"path": "a.txt", "split": "train"},
        {"texts": ["a"], "config": "en"},
        {"hub": "nothing"},
        {"hub": "../c4"},
        {"hub": "a/b", "text_column": "a", "messages_column": "b"},
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DatasetSpec.model_validate(fields)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_preset_says_how_a_row_becomes_a_document(preset: Any) -> None:
    ways = [preset.text_column, preset.messages_column, *preset.templates[:1]]
    assert sum(way is not None for way in ways) == 1
