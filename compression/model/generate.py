"""Calibration text that the model writes itself, for who has none that is like what it will read.

    BOS, a token from anywhere in the vocabulary ─▶ the likeliest few ─▶ tokens drawn from the distribution

as LLM-QAT's hybrid sampling does (Liu et al., arXiv 2305.17888, section 3.1): the first words find a subject,
and after that the text is as varied as the model's own distribution.

Several documents are written side by side, with a cache of keys and values. Each token needs all weights: the
layers of a model that is too large to be held are read anew for each, so that memory stays bounded and the
disk is what takes the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from compression.boundary import foreign
from compression.checkpoint.writer import write_file
from compression.data.tokenizer import load_tokenizer
from compression.errors import NumericalError, SourceError
from compression.model.streamed import StreamedModel
from compression.planning.memory import GENERATION_CACHE_BYTES, GENERATION_WEIGHTS_BYTES
from compression.planning.plans import Plan
from compression.recipe import DatasetSpec

LONGEST = 256
"""Tokens of a document. Keys and values are held for all of them, so longer ones would leave room for fewer
side by side."""
LIKELIEST = 4
"""Tokens at a document's beginning that are the model's first choice."""
MOST_AT_ONCE = 256
"""Documents side by side."""
_SLACK_BLOCKS = 2
"""The held-out text and the calibration's each end within a document, the rest of which is dropped."""
_MORE = 1.25
"""Tokens that are begun for one that is still needed: some documents will end before their last one."""
_TRIES = 4
"""Tokens written for one that is needed, before a model is given up that ends its documents early."""

OnTokens = Callable[[int, int], None]
"""Called with the tokens so far and those that are needed. What it raises ends the writing."""


def written_by_model(
    plan: Plan,
    model: StreamedModel,
    folder: Path,
    on_tokens: OnTokens,
    *,
    weights_bytes: int = GENERATION_WEIGHTS_BYTES,
) -> DatasetSpec:
    """As much text as the plan's calibration and evaluation need, as a .jsonl file in `folder`.

    The same seed, model and arithmetic give the same text. A file that is there already is taken as it is: it
    appears whole or not at all, and the journal's folder is of one work. The layers of `model` stay in memory
    while it writes if they take at most `weights_bytes`. It must not be used for anything else.

    Raises:
        SourceError: `tokenizer_missing`; `generated_text_too_short` for a model that ends its documents
            before they are long enough to be of use.
        NumericalError: `non_finite_logits`, and `non_finite_weights`.
    """
    path = folder / "generated.jsonl"
    if not path.exists():
        tokenizer = load_tokenizer(plan.source)
        with _awake(model, weights_bytes):
            texts = list(_enough(_Writer(model, tokenizer, plan.calibration.seed), plan, on_tokens))
        write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return DatasetSpec(path=str(path), text_column="text")


def _enough(writer: _Writer, plan: Plan, on_tokens: OnTokens) -> Iterator[str]:
    """Documents, until the calibration and the evaluation have what they need."""
    calibration = plan.calibration
    blocks = plan.evaluation.samples(calibration)
    blocks += calibration.num_calibration_samples if plan.calibrates else 0
    length = min(LONGEST, calibration.max_seq_length)
    needed = (blocks + _SLACK_BLOCKS) * calibration.max_seq_length if calibration.packing else blocks * length
    missing, tokens, documents, written = needed, 0, 0, 0
    while missing > 0:
        if written > _TRIES * needed:
            raise SourceError(
                "generated_text_too_short",
                f"The model wrote {documents} documents with {tokens} tokens in place of {needed}.",
                "It ends its documents early: give it text of your own as the dataset.",
            )
        lot = min(writer.at_once, 1 + int(_MORE * missing) // length)
        begun = partial(_told, on_tokens, needed - missing, lot, needed)
        for text in writer.write(lot, length, begun):
            with foreign("tokenizer_failed", "The model's tokenizer fails on text of the model"):
                size = len(writer.tokenizer(text, verbose=False)["input_ids"])
            if size > 1:
                tokens, documents = tokens + size, documents + 1
                yield text
        written += lot * length
        missing = needed - (tokens if calibration.packing else documents * length)
    on_tokens(needed, needed)


def _told(on_tokens: OnTokens, finished: int, lot: int, needed: int, position: int) -> None:
    """So many tokens are finished, and of a lot of documents as many as have come to `position`."""
    on_tokens(min(finished + lot * position, needed - 1), needed)


@dataclass
class _Writer:
    """Writes some documents at a time, each lot going on in the random sequence of the one before.

    at_once: documents side by side at most; found from what the cache takes for one token.
    """

    model: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    at_once: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(self.seed)
        config = self.model.module.config.get_text_config()
        special = set(self.tokenizer.all_special_ids)
        known = range(min(len(self.tokenizer), config.vocab_size))
        self._starts = torch.tensor([token for token in known if token not in special])
        bos = self.tokenizer.bos_token_id
        self._prefix = [bos] if bos is not None and bos in self.tokenizer("").input_ids else []
        ends = {self.tokenizer.eos_token_id, *_as_list(config.eos_token_id)}
        self._ends = torch.tensor(sorted(ends - {None}), dtype=torch.int64)
        cache = self._new_cache()
        self._next_logits(torch.tensor([[*self._prefix, int(self._starts[0])]]), cache)
        a_token = _cache_bytes(cache) / (len(self._prefix) + 1)
        self.at_once = max(1, min(MOST_AT_ONCE, int(GENERATION_CACHE_BYTES / a_token / LONGEST)))

    def write(self, count: int, length: int, on_position: Callable[[int], None]) -> list[str]:
        """The texts of some documents of at most `length` tokens, each up to where the model ends it."""
        first = torch.randint(len(self._starts), (count, 1), generator=self._random)
        prefix = torch.tensor([self._prefix] * count, dtype=torch.int64).view(count, -1)
        latest = torch.cat([prefix, self._starts[first]], dim=1)
        tokens = latest
        ended = torch.zeros(count, 1, dtype=torch.bool)
        cache = self._new_cache()
        for position in range(length - latest.shape[1]):
            logits = self._next_logits(latest, cache)
            if position < LIKELIEST:
                latest = logits.argmax(-1, keepdim=True)
            else:
                latest = torch.multinomial(logits.softmax(-1), 1, generator=self._random)
            tokens = torch.cat([tokens, latest], dim=1)
            on_position(position)
            ended |= torch.isin(latest, self._ends)
            if ended.all():
                break
        return [self._text(row.tolist()) for row in tokens[:, len(self._prefix) :]]

    def _text(self, tokens: list[int]) -> str:
        ends = self._ends.tolist()
        length = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
        with foreign("tokenizer_failed", "The model's tokenizer fails on tokens of the model"):
            return str(self.tokenizer.decode(tokens[:length], skip_special_tokens=True)).strip()

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.module.config.get_text_config())

    def _next_logits(self, tokens: Tensor, cache: DynamicCache) -> Tensor:
        """What follows tokens, int64 [documents, seq]: float32 [documents, vocab], on the CPU."""
        output = self.model.module(
            input_ids=tokens.to(self.model.device), past_key_values=cache, use_cache=True
        )
        logits: Tensor = output.logits[:, -1].float().cpu()
        if not logits.isfinite().all():
            raise NumericalError(
                "non_finite_logits",
                "The original model's logits hold NaN or Inf where it writes its own calibration text.",
                "Check the source model and its dtype: float16 overflows at 65504.",
            )
        return logits


@contextmanager
def _awake(model: StreamedModel, weights_bytes: int) -> Iterator[None]:
    """The whole model ready to run: its layers in memory, or each while it runs."""
    numbers = sum(parameter.numel() for layer in model.layers for parameter in layer.parameters())
    with ExitStack() as undo:
        model.load_embeddings()
        model.load_head()
        for index, layer in enumerate(model.layers):
            if numbers * model.compute_dtype.itemsize <= weights_bytes:
                model.load_layer(index)
                continue
            for handle in (
                layer.register_forward_pre_hook(lambda *_, index=index: model.load_layer(index)),
                layer.register_forward_hook(lambda *_, index=index: model.drop_layer(index)),
            ):
                undo.callback(handle.remove)
        yield


def _cache_bytes(cache: DynamicCache) -> int:
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
