"""Text into token blocks, with a tokenizer of one token a byte, so that expectations can be written down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compression.data.calibration import TokenBlocks, load_blocks
from compression.data.tokenizer import TextTokenizer, load_tokenizer
from compression.errors import SourceError
from compression.recipe import Calibration, DatasetSpec, Evaluation
from tests.support.models import tiny_tokenizer

BOS = 256
OFF = Evaluation(enabled=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that calibration needs of a model: tokenizer and config."""
    folder = tmp_path_factory.mktemp("source")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    return folder


def as_lists(blocks: tuple[torch.Tensor, ...]) -> list[list[int]]:
    return [block.tolist() for block in blocks]


def tokens_of(text: str) -> list[int]:
    """The tiny tokenizer, once more: its ids follow the order of the alphabet GPT-2 maps bytes to."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    order = {byte: index for index, byte in enumerate(printable + rest)}
    assert len(order) == 256
    return [BOS, *(order[byte] for byte in text.encode())]


def documents_of(blocks: tuple[torch.Tensor, ...], texts: list[str]) -> set[int]:
    """Which texts have tokens in the blocks: each text is made of a letter of its own."""
    found = {token for block in blocks for token in block.tolist()} - {BOS}
    return {index for index, text in enumerate(texts) if tokens_of(text)[1] in found}


LETTERS = [letter * length for letter, length in zip("abcdefghijklmnop", range(20, 52, 2), strict=True)]


def load(source: Path, texts: list[str], evaluation: Evaluation = OFF, **settings: object) -> TokenBlocks:
    return load_blocks(
        DatasetSpec(texts=tuple(texts)), source, Calibration.model_validate(settings), evaluation
    )


def test_one_document_is_cut_into_blocks(source: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog."
    blocks = load(source, [text], num_calibration_samples=4, max_seq_length=10)
    tokens = tokens_of(text)
    assert len(tokens) == 45
    expected = [tokens[begin : begin + 10] for begin in (0, 10, 20, 30)]
    assert sorted(as_lists(blocks.calibration)) == sorted(expected)
    assert all(block.dtype == torch.int64 for block in blocks.calibration)
    report = blocks.report
    assert (report.documents, report.samples, report.tokens_used, report.tokens_dropped) == (1, 4, 40, 5)


def test_documents_follow_one_another_without_a_gap(source: Path) -> None:
    blocks = load(source, LETTERS, num_calibration_samples=20, max_seq_length=16)
    stream = [token for block in blocks.calibration for token in block.tolist()]
    runs: list[list[int]] = []
    for token in stream:
        if token == BOS:
            runs.append([])
        runs[-1].append(token)
    wanted = [tokens_of(text) for text in LETTERS]
    assert all(run in wanted for run in runs[:-1])
    assert any(document[: len(runs[-1])] == runs[-1] for document in wanted)
    drawn = sum(len(next(one for one in wanted if one[1] == run[1])) for run in runs)
    assert blocks.report.documents == len(runs)
    assert blocks.report.tokens_used == 320
    assert blocks.report.tokens_dropped == drawn - 320


def test_held_out_documents_are_apart_and_in_addition(source: Path) -> None:
    wanted = {"num_calibration_samples": 10, "max_seq_length": 32}
    blocks = load(source, LETTERS, Evaluation(num_samples=3), **wanted)
    learned, held_out = documents_of(blocks.calibration, LETTERS), documents_of(blocks.evaluation, LETTERS)
    assert (len(blocks.calibration), len(blocks.evaluation), blocks.split) == (10, 3, "documents")
    assert learned
    assert held_out
    assert not learned & held_out
    assert {len(block) for block in (*blocks.calibration, *blocks.evaluation)} == {32}


def test_no_more_blocks_than_asked_for(source: Path) -> None:
    blocks = load(source, LETTERS, Evaluation(num_samples=1), num_calibration_samples=3, max_seq_length=4)
    assert (len(blocks.calibration), len(blocks.evaluation)) == (3, 1)
    assert blocks.report.documents == 2
    assert blocks.report.tokens_used == 16


def test_one_document_is_split_by_blocks(source: Path) -> None:
    text = "".join(chr(33 + index) for index in range(90))
    wanted = {"num_calibration_samples": 7, "max_seq_length": 10}
    blocks = load(source, [text], Evaluation(num_samples=2), **wanted)
    assert blocks.split == "blocks"
    tokens = tokens_of(text)
    expected = [tokens[begin : begin + 10] for begin in range(0, 90, 10)]
    assert sorted(as_lists(blocks.calibration) + as_lists(blocks.evaluation)) == sorted(expected)
    held_out = {
        str(as_lists(load(source, [text], Evaluation(num_samples=2), seed=seed, **wanted).evaluation))
        for seed in range(4)
    }
    assert len(held_out) > 1


def test_the_seed_decides(source: Path) -> None:
    first, same, other = (
        load(
            source,
            LETTERS,
            Evaluation(num_samples=2),
            num_calibration_samples=5,
            max_seq_length=16,
            seed=seed,
        )
        for seed in (1, 1, 2)
    )
    assert as_lists(first.calibration) == as_lists(same.calibration)
    assert as_lists(first.evaluation) == as_lists(same.evaluation)
    assert as_lists(first.calibration) != as_lists(other.calibration)
    assert as_lists(first.evaluation) != as_lists(other.evaluation)


def test_another_process_gives_the_same_blocks(source: Path, tiny_texts: Path) -> None:
    """Whatever the hash seed and the number of tokenizer threads."""
    code = (
        "from pathlib import Path; from compression.recipe import *;"
        "from compression.data.calibration import load_blocks;"
        f"blocks = load_blocks(DatasetSpec(path={str(tiny_texts)!r}), Path({str(source)!r}),"
        "Calibration(num_calibration_samples=9, max_seq_length=100, seed=5), Evaluation(num_samples=3));"
        "print([block.tolist() for block in blocks.calibration + blocks.evaluation])"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = load_blocks(
        DatasetSpec(path=str(tiny_texts)),
        source,
        Calibration(num_calibration_samples=9, max_seq_length=100, seed=5),
        Evaluation(num_samples=3),
    )
    assert json.loads(there.stdout) == as_lists(here.calibration + here.evaluation)


def test_without_packing_a_row_is_a_truncated_document(source: Path) -> None:
    texts = ["a" * 5, "b" * 30, "c" * 8, "d" * 40]
    blocks = load(source, texts, num_calibration_samples=4, max_seq_length=12, packing=False)
    assert sorted(as_lists(blocks.calibration)) == sorted(tokens_of(text)[:12] for text in texts)
    assert blocks.report.tokens_used == 6 + 12 + 9 + 12
    assert blocks.report.tokens_dropped == (31 - 12) + (41 - 12)


def test_only_as_many_documents_are_tokenized_as_needed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller batches tokenize less of the dataset and give the same blocks."""
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": f"{index:04d} " * 20}) + "\n" for index in range(500)))
    wanted = Calibration(num_calibration_samples=5, max_seq_length=64)
    whole = load_blocks(DatasetSpec(path=str(path)), source, wanted, OFF)
    assert whole.report.documents == 4
    monkeypatch.setattr("compression.data.calibration._BATCH_CHARACTERS", 150)
    by_two = load_blocks(DatasetSpec(path=str(path)), source, wanted, OFF)
    assert as_lists(by_two.calibration) == as_lists(whole.calibration)
    assert by_two.report == whole.report


def test_messages_go_through_the_chat_template(source: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    dataset = DatasetSpec(path=str(path), messages_column="messages")
    wanted = Calibration(num_calibration_samples=1, max_seq_length=100, packing=False)
    blocks = load_blocks(dataset, source, wanted, OFF)
    assert as_lists(blocks.calibration) == [tokens_of("[user]Hi\n[assistant]Hello\n")[1:]]


def test_evaluation_alone(source: Path) -> None:
    blocks = load_blocks(
        DatasetSpec(texts=tuple(LETTERS)),
        source,
        Calibration(max_seq_length=32),
        Evaluation(num_samples=2),
        calibrate=False,
    )
    assert (len(blocks.calibration), len(blocks.evaluation)) == (0, 2)
    assert blocks.report.samples == 0


def refused(source: Path, texts: list[str], evaluation: Evaluation = OFF, **settings: object) -> SourceError:
    with pytest.raises(SourceError) as caught:
        load(source, texts, evaluation, **settings)
    return caught.value


def test_too_little_text_says_what_there_is(source: Path) -> None:
    error = refused(source, ["a" * 99], num_calibration_samples=30, max_seq_length=10)
    assert error.code == "dataset_too_small"
    assert "10 blocks of 10 tokens; 30 for calibration and 0 for" in error.message
    error = refused(source, ["a" * 9, "b" * 9], Evaluation(num_samples=1), max_seq_length=10)
    assert "2 blocks of 10 tokens; 512 for calibration and 1 for" in error.message
    error = refused(source, ["a", "b", "c"], num_calibration_samples=4, max_seq_length=10, packing=False)
    assert "gives 3 documents; 4 for calibration" in error.message


def test_missing_tokenizer_and_template(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    assert refused(bare, ["a" * 99]).code == "tokenizer_missing"
    assert refused(tmp_path / "nowhere", ["a" * 99]).code == "tokenizer_missing"

    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    (plain / "chat_template.jinja").unlink()
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"chat": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(SourceError) as caught:
        load_blocks(DatasetSpec(path=str(path), messages_column="chat"), plain, Calibration(), OFF)
    assert caught.value.code == "chat_template_missing"


def test_a_conversation_that_the_template_refuses(source: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(source, strict)
    (strict / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"chat": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(SourceError, match="roles must alternate") as caught:
        load_blocks(DatasetSpec(path=str(path), messages_column="chat"), strict, Calibration(), OFF)
    assert caught.value.code == "dataset_invalid"


def test_a_tokenizer_of_another_model(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "config.json").write_text(json.dumps({"vocab_size": 256}))
    error = refused(other, ["a" * 99], num_calibration_samples=10, max_seq_length=10)
    assert error.code == "tokenizer_mismatch"
    assert "256" in error.message


def test_a_tokenizer_that_truncates_does_not_here(source: Path, tmp_path: Path) -> None:
    """Checkpoints whose tokenizer.json carries someone's truncation exist."""
    cut = tmp_path / "cut"
    shutil.copytree(source, cut)
    state = json.loads((cut / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (cut / "tokenizer.json").write_text(json.dumps(state))
    blocks = load(cut, ["a" * 99], num_calibration_samples=10, max_seq_length=10)
    assert blocks.report.tokens_used == 100


def rows(path: Path, *documents: object) -> DatasetSpec:
    """A .jsonl file: texts, or conversations in the column `messages`."""
    lines = [{"text": d} if isinstance(d, str) else {"messages": d} for d in documents]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DatasetSpec(path=str(path))


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


def test_templates_that_serve_no_conversation(source: Path, tmp_path: Path) -> None:
    dataset = rows(tmp_path / "chats.jsonl", [{"role": "user", "content": "Hi"}])
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(SourceError, match=r"Line 2 of the model's chat template") as caught:
        load_blocks(dataset, broken, Calibration(), OFF)
    assert caught.value.code == "chat_template_invalid"
    (broken / "chat_template.jinja").unlink()
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match="rag") as caught:
        load_blocks(dataset, broken, Calibration(), OFF)
    assert caught.value.code == "chat_template_missing"


def test_a_tokenizer_of_a_later_version(source: Path, tmp_path: Path) -> None:
    later = tmp_path / "later"
    shutil.copytree(source, later)
    state = json.loads((later / "tokenizer.json").read_text())
    for hostile in ({**state, "model": {**state["model"], "type": "NextBPE"}}, {"version": "9.0"}, []):
        (later / "tokenizer.json").write_text(json.dumps(hostile))
        error = refused(later, ["a" * 99])
        assert error.code == "tokenizer_invalid"
        assert "tokenizer.json" in error.message
        assert "tokenizers" in error.hint


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path) -> None:
    """As Llama 2 and Mistral 7B came: tokenizer.model, no tokenizer.json."""
    import sentencepiece

    folder = tmp_path / "spm"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(config))
    sentences = [" ".join(f"word{number % 7} and more" for number in range(20))] * 50
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, model_type="bpe", byte_fallback=True,
            vocab_size=300, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = sentences[0]
    blocks = load(folder, [text], num_calibration_samples=1, max_seq_length=12, packing=False)
    (tokens,) = as_lists(blocks.calibration)
    assert len(tokens) == 12
    assert len(processor.decode(tokens)) > 30
    assert text.startswith(processor.decode(tokens))
