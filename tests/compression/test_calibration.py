"""Text into token blocks, with a tokenizer of one token a byte, so that expectations can be written down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compression.data.calibration import load_blocks
from compression.errors import SourceError
from compression.recipe import Calibration, DatasetSpec, Evaluation
from tests.compression.byte_tokens import (
    BOS,
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


LETTERS = [letter * length for letter, length in zip("abcdefghijklmnop", range(20, 52, 2), strict=True)]


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
