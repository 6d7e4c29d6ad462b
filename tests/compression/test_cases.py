"""Data, templates and recipes that other tools choke on, each through the command line.

Every case stands for what many people reported. Each runs, or ends with a code that says which row or field
it is about; no traceback is ever shown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compression.__main__ import main
from tests.support.models import CHAT_TEMPLATE

Make = Callable[[Path], list[str]]
"""Writes a case's files into a folder, where `model` is one already; gives the options."""

TEXTS = [f"Text number {number} of some that are long enough. " * 8 for number in range(40)]
CHATS = [
    [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "Answer " * 20}]
    for number in range(60)
]


def write(path: Path, *rows: Any, raw: bytes = b"") -> list[str]:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + raw)
    return ["--scheme", "W8A16", "--dataset", str(path), "--method", "rtn"]


def texts(folder: Path, raw: bytes) -> list[str]:
    return write(folder / "texts.jsonl", *({"text": text} for text in TEXTS), raw=raw)


def half_surrogate(folder: Path) -> list[str]:
    return texts(folder, b'{"text": "half an emoji \\ud83d ' + b"word " * 300 + b'"}\n')


def deep(folder: Path) -> list[str]:
    return texts(folder, b'{"text": "x", "meta": ' + b"[" * 3000 + b"]" * 3000 + b"}\n")


def one_long_row(folder: Path) -> list[str]:
    rows = [{"text": " ".join(TEXTS) * 120}, *({"text": text[:60]} for text in TEXTS[:3])]
    return write(folder / "long.jsonl", *rows)


def one_bad_chat(folder: Path) -> list[str]:
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    (folder / "model" / "chat_template.jinja").write_text(refusing + CHAT_TEMPLATE)
    rows = [{"messages": chat} for chat in [*CHATS, [{"role": "tool", "content": "x"}]]]
    return [*write(folder / "chats.jsonl", *rows), "--no-packing", "--num-calibration-samples", "58"]


def template_divides(folder: Path) -> list[str]:
    (folder / "model" / "chat_template.jinja").write_text("\n{{ 1 / (messages | length - 2) }}")
    return write(folder / "chats.jsonl", *({"messages": chat} for chat in CHATS))


def no_default_template(folder: Path) -> list[str]:
    (folder / "model" / "chat_template.jinja").unlink()
    path = folder / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": [{"name": "rag", "template": "x"}]}
    path.write_text(json.dumps(settings))
    return write(folder / "chats.jsonl", *({"messages": chat} for chat in CHATS))


def later_tokenizer(folder: Path) -> list[str]:
    path = folder / "model" / "tokenizer.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "model": {**state["model"], "type": "NextBPE"}}))
    return texts(folder, b"")


def recipe(text: str) -> Make:
    def make(folder: Path) -> list[str]:
        (folder / "recipe.yaml").write_text(text)
        return ["--recipe", str(folder / "recipe.yaml"), *texts(folder, b"")[2:4]]

    return make


peer_kv = recipe("""default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: FP8
      kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, group_size: null, strategy: tensor,
        block_structure: null, dynamic: false, actorder: null, scale_dtype: null, zp_dtype: null,
        observer: null, observer_kwargs: {}}
""")
peer_sparse_stage = recipe(r"""sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: ['re:.*layers\.\d+$']}
""")
peer_smoothquant = recipe("""quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
      mappings:
      - [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]
      - [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]
    GPTQModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head, "re:vision_tower.*"]}
""")


@pytest.fixture
def run(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Make], tuple[int, str]]:
    """Exit code and stderr of a case; what succeeded has its checkpoint."""

    def run(make: Make) -> tuple[int, str]:
        shutil.copytree(tiny_llama, tmp_path / "model")
        options = make(tmp_path)
        small = ["--num-calibration-samples", "4", "--max-seq-length", "128", "--num-evaluation-samples", "2"]
        output = tmp_path / "out"
        code = main([str(tmp_path / "model"), "--output-dir", str(output), *small, *options])
        assert (output / "config.json").exists() == (code == 0)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, err

    return run


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (half_surrogate, ""),
        (one_long_row, ""),
        (
            one_bad_chat,
            "were dropped: Line 61; the first, as the chat template refuses it: line 1: no tools.",
        ),
        (peer_kv, ""),
        (peer_sparse_stage, "pruned_stored_dense"),
        (peer_smoothquant, "pattern_matches_nothing The pattern 're:vision_tower.*' in ignore"),
    ],
)
def test_it_runs(run: Callable[[Make], tuple[int, str]], make: Make, warning: str) -> None:
    code, err = run(make)
    assert code == 0, err
    assert warning in err


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (deep, "dataset_invalid", "Line 41 of the dataset is not JSON that can be read: nested too deeply"),
        (template_divides, "dataset_invalid", "line 2: ZeroDivisionError: division by zero"),
        (no_default_template, "chat_template_missing", "default"),
        (later_tokenizer, "tokenizer_invalid", "tokenizer.json"),
    ],
)
def test_it_says_what_is_wrong(
    run: Callable[[Make], tuple[int, str]], make: Make, code: str, says: str
) -> None:
    exit_code, err = run(make)
    assert exit_code == 1
    assert f"\n{code} " in f"\n{err.splitlines()[-1]}"
    assert says in err


def test_half_a_character_is_dropped_if_it_is_drawn(tiny_llama: Path, tmp_path: Path) -> None:
    options = half_surrogate(tmp_path)
    drawn = ["--num-calibration-samples", "39", "--max-seq-length", "64", "--no-packing", "--no-evaluation"]
    assert main([str(tiny_llama), "--output-dir", str(tmp_path / "out"), *options, *drawn]) == 0
    written = json.loads((tmp_path / "out" / "bitmill.json").read_text())["report"]
    told = [warning["message"] for warning in written["warnings"] if warning["code"] == "rows_dropped"]
    assert (written["data"]["documents_dropped"], len(told)) in ((1, 1), (0, 0))
    assert all("Line 41" in message and r"\ud83d" in message for message in told)


def test_strict_refuses_an_ignore_that_matches_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tiny_llama), "--scheme", "W8A16", "--ignore", "lm_head", "--ignore", "re:vision.*"]
    assert main([*options, "--output-dir", str(tmp_path / "strict"), "--strict"]) == 1
    assert "pattern_matches_nothing" in capsys.readouterr().err
    assert main([*options, "--output-dir", str(tmp_path / "out")]) == 0
    assert "pattern_matches_nothing" in capsys.readouterr().err


def test_ctrl_c_is_no_crash(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.pipeline.Activations", interrupt)
    assert main([str(tiny_llama), "--scheme", "W8A16", "--output-dir", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
