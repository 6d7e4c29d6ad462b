"""Documents longer than a part, and documents that have no tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compression.data.calibration import load_blocks
from compression.data.tokenizer import TextTokenizer, load_tokenizer
from compression.errors import SourceError
from compression.recipe import Calibration, Evaluation
from tests.compression.byte_tokens import (
    OFF,
    as_lists,
    documents_of,
    load,
    make_source,
    refused,
    rows,
    tokens_of,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("seed", range(4))
def test_one_long_document_beside_short_ones_is_enough(source: Path, seed: int) -> None:
    """Wherever it is drawn, the rest of it serves where the others are too short for the calibration."""
    texts = ["a" * 5_000, "b" * 15, "c" * 15, "d" * 15]
    settings = {"num_calibration_samples": 40, "max_seq_length": 64, "seed": seed}
    blocks = load(source, texts, Evaluation(num_samples=4), **settings)
    assert (len(blocks.calibration), len(blocks.evaluation)) == (40, 4)
    held_out, learned = documents_of(blocks.evaluation, texts), documents_of(blocks.calibration, texts)
    assert blocks.split == ("blocks" if held_out & learned else "documents")
    stream = [token for block in (*blocks.evaluation, *blocks.calibration) for token in block.tolist()]
    assert stream.count(tokens_of("a")[1]) <= 5_000
    error = refused(source, texts, Evaluation(num_samples=4), **{**settings, "num_calibration_samples": 80})
    assert error.code == "dataset_too_small"


def test_a_long_document_is_tokenized_in_parts_and_as_far_as_needed(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(f"{number:06d}" for number in range(20_000))
    wanted = {"num_calibration_samples": 6, "max_seq_length": 100}
    whole = load(source, [text, "short"], **wanted)
    assert whole.report.tokens_dropped > 100_000
    monkeypatch.setattr("compression.data.calibration.LONGEST_PART", 1000)
    monkeypatch.setattr("compression.data.tokenizer.LONGEST_PART", 1000)
    parts = load(source, [text, "short"], **wanted)
    assert as_lists(parts.calibration) == as_lists(whole.calibration)
    assert parts.report.tokens_dropped < 1000
    everything = TextTokenizer(load_tokenizer(source)).encode_long(text, special=True)
    assert [token for part in everything for token in part] == tokens_of(text)
    rows_of = load(source, [text, "short" * 300], **{**wanted, "num_calibration_samples": 2}, packing=False)
    assert sorted(as_lists(rows_of.calibration)) == sorted(
        [tokens_of(text)[:100], tokens_of("short" * 20)[:100]]
    )


def test_a_single_long_document_is_tokenized_as_far_as_blocks_are_drawn_from_it(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compression.data.calibration.LONGEST_PART", 1000)
    monkeypatch.setattr("compression.data.tokenizer.LONGEST_PART", 1000)
    text = " ".join(f"{number:06d}" for number in range(20_000))
    few = {"num_calibration_samples": 4, "max_seq_length": 100}
    report = load(source, [text], **few).report
    assert 16 * 400 <= report.tokens_used + report.tokens_dropped <= 16 * 400 + 1000
    begin = text[: 16 * 400]
    of_begin, of_whole = (load(source, [part], **few).calibration for part in (begin, text))
    assert as_lists(of_begin) == as_lists(of_whole)


def test_a_text_without_spaces_is_cut_all_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.data.tokenizer.LONGEST_PART", 64)
    tokenizer = TextTokenizer(load_tokenizer(source))
    for text in ("a" * 1000, "a  " * 300, "\n\n" * 200, " x" * 500, ""):
        assert [token for part in tokenizer.encode_long(text, special=True) for token in part] == tokens_of(
            text
        )


@pytest.mark.parametrize(("place", "samples"), [(0, 18), (150, 30)])
def test_a_long_document_on_which_the_tokenizer_fails_is_dropped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, samples: int
) -> None:
    """From there on: what was tokenized before that part stays."""
    words = Tokenizer(WordLevel({"a": 0, "b": 1}))  # no token for others: it fails on them
    words.pre_tokenizer = cast(Any, WhitespaceSplit())
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    shutil.copy(source / "config.json", tmp_path)
    monkeypatch.setattr("compression.data.calibration.LONGEST_PART", 100)
    monkeypatch.setattr("compression.data.tokenizer.LONGEST_PART", 100)
    damaged = ["b"] * 200
    damaged[place] = "unknown"
    wanted = {"num_calibration_samples": samples, "max_seq_length": 10, "max_dropped_share": 0.5}
    blocks = load(tmp_path, [" ".join(damaged), "a " * 100, "a " * 40, "a " * 40], **wanted)
    assert blocks.report.documents_dropped == 1
    assert blocks.warnings[0].message.startswith("1 of 4 rows that were read")
    assert "the tokenizer fails on it: WordLevel error" in blocks.warnings[0].message
    tokens = [token for block in blocks.calibration for token in block.tolist()]
    assert tokens.count(1) <= place
    with pytest.raises(SourceError, match="max_dropped_share 0 allows"):
        load(tmp_path, [" ".join(damaged)], **{**wanted, "max_dropped_share": 0.0})


class TestDropped:
    GOOD = ({"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"})

    @pytest.fixture
    def strict(self, source: Path, tmp_path: Path) -> Path:
        """A model whose template refuses tools, in its second line."""
        folder = tmp_path / "strict"
        shutil.copytree(source, folder)
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}\n{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "{{ m.content }}{% if m.zero is defined %}{{ 1 / m.zero }}{% endif %}\n{% endfor %}"
        )
        return folder

    def test_one_refused_conversation_is_dropped_counted_and_named(
        self, strict: Path, tmp_path: Path
    ) -> None:
        bad = [{"role": "tool", "content": "x"}]
        conversations: list[object] = [list(self.GOOD)] * 299
        conversations.insert(17, bad)
        dataset = rows(tmp_path / "chats.jsonl", *conversations)
        wanted = Calibration(num_calibration_samples=299, max_seq_length=16, packing=False)
        blocks = load_blocks(dataset, strict, wanted, OFF)
        assert (blocks.report.documents, blocks.report.documents_dropped) == (299, 1)
        (warning,) = blocks.warnings
        assert warning.code == "rows_dropped"
        assert "Line 18; the first, as the chat template refuses it: line 2: no tools." in warning.message

    def test_beyond_the_share_the_rows_are_named(self, strict: Path, tmp_path: Path) -> None:
        conversations = [
            [{"role": "user", "content": "some words"} | ({"zero": 0} if number % 10 == 3 else {})]
            for number in range(200)
        ]
        dataset = rows(tmp_path / "chats.jsonl", *conversations)
        wanted = Calibration(num_calibration_samples=100, max_seq_length=8, packing=False)
        with pytest.raises(SourceError, match=r"line 2: ZeroDivisionError: division by zero") as caught:
            load_blocks(dataset, strict, wanted, OFF)
        assert caught.value.code == "dataset_invalid"
        assert "max_dropped_share 0.05 allows: Line " in caught.value.message
        assert "and " in caught.value.message
        more = wanted.model_copy(update={"max_dropped_share": 0.2})
        assert load_blocks(dataset, strict, more, OFF).report.documents == 100
        none = wanted.model_copy(update={"max_dropped_share": 0.0})
        with pytest.raises(SourceError, match="max_dropped_share 0 allows"):
            load_blocks(
                rows(tmp_path / "one.jsonl", *([[self.GOOD[0]]] * 50), [{"role": "tool"}]), strict, none, OFF
            )

    def test_half_a_character_is_dropped_wherever_it_stands(self, source: Path, tmp_path: Path) -> None:
        dataset = rows(
            tmp_path / "texts.jsonl", *(f"text {number} " * 9 for number in range(30)), "half \ud83d " * 9
        )
        wanted = Calibration(num_calibration_samples=30, max_seq_length=16, packing=False)
        blocks = load_blocks(dataset, source, wanted, OFF)
        assert blocks.report.documents_dropped == 1
        assert r"Line 31; the first, as it holds \ud83d" in blocks.warnings[0].message
        deep = [{"role": "user", "content": "\udc00"}]
        chats = rows(tmp_path / "chats.jsonl", *([list(self.GOOD)] * 30), deep)
        assert load_blocks(chats, source, wanted, OFF).report.documents_dropped == 1
