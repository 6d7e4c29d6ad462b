"""Run by vLLM's interpreter: loads a checkpoint, asks a question, prints the answer as one line of JSON.

    .venv-vllm/bin/python tests/conformance/vllm_answer.py CHECKPOINT QUESTION
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; must be set before the import

from vllm import LLM, SamplingParams


def main(checkpoint: str, question: str) -> None:
    model = LLM(checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=512)
    sampling = SamplingParams(temperature=0, max_tokens=32)
    [reply] = model.chat([{"role": "user", "content": question}], sampling, use_tqdm=False)
    sys.stdout.write("\n" + json.dumps({"answer": reply.outputs[0].text}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
