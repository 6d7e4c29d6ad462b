"""Asks checkpoints the demo's questions, with Transformers: python -m cli.demo.answer FOLDER...

A process of its own, so that its memory and its imports are not the demo's. Prints each answer as it comes,
a JSON string on a line: the first folder's answers in the order of the questions, then the next folder's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.demo.questions import QUESTIONS

MAX_NEW_TOKENS = 80


def answers(folder: Path) -> Iterator[str]:
    """The model's greedy answers, in its checkpoint's dtype. " ..." is the end of one that was cut."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            tokens = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokens[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        yield text if len(answer) < MAX_NEW_TOKENS else f"{text} ..."


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        for text in answers(Path(folder)):
            sys.stdout.write(json.dumps(text) + "\n")
            sys.stdout.flush()
