"""Asks checkpoints a question, with Transformers: python -m cli.demo.answer QUESTION FOLDER...

A process of its own, so that its memory and its imports are not the demo's. Prints one JSON array of answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 40


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer to one chat message."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    reply: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return reply.strip()


if __name__ == "__main__":
    question, *folders = sys.argv[1:]
    sys.stdout.write(json.dumps([answer(Path(folder), question) for folder in folders]) + "\n")
