"""The tokenizer beside the weights: text and conversations -> token ids, whatever the tokenizer does.

    conversation ──chat template──▶ text ──▶ parts of at most LONGEST_PART characters ──▶ token ids

Tokenizers, templates and text come from strangers. What cannot be used of the text is a `RowRefused`; who
draws documents decides how many of those are too many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import tokenizers
from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from compression.boundary import foreign, is_out_of_memory, reason
from compression.data.columns import Document, Messages
from compression.errors import SourceError

LONGEST_PART = 1 << 20
"""Characters that are tokenized in one call; a longer text in parts, so that memory is bounded by this."""

_TOKENIZER_FILES = re.compile(r"tokenizer.*|vocab.*|merges\.txt|.*\.model|.*\.tiktoken|.*vocab\.json")


class RowRefused(Exception):
    """A document that has no tokens; the message says why."""


class TextTokenizer:
    """Token ids of texts and conversations, as the model sees them.

    Raises, from every call, SourceError: `tokenizer_failed`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text_of(self, document: Document) -> str:
        """A document's text; of a conversation, what the chat template makes of it.

        Raises:
            RowRefused: the template fails on it, or it holds half a character.
            SourceError: `chat_template_missing`, `chat_template_invalid`.
        """
        text = document if isinstance(document, str) else self._rendered(document)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start].encode("unicode_escape").decode()
            raise RowRefused(f"it holds {half}, half of a surrogate pair, which is no character") from None
        return text

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of texts of at most LONGEST_PART characters. special: with the tokens that a tokenizer
        adds to a text; a chat template writes its own."""
        with foreign("tokenizer_failed", "The model's tokenizer fails on text of the dataset", _OTHER_TEXT):
            encoded = self._tokenizer(
                list(texts),
                add_special_tokens=special,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,  # no warning that a document is longer than the model's context
            )
            ids: list[list[int]] = encoded["input_ids"]
        return ids

    def encode_long(self, text: str, *, special: bool) -> Iterator[list[int]]:
        """Token ids of a text of any length, part by part, each tokenized when it is asked for.

        The tokens at a cut, one place in a million characters, may not be those of the whole text.
        """
        before, after = self._added if special else ([], [])
        yield before
        for part in _parts(text):
            yield from self.encode([part], special=False)
        yield after

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        (plain,), (whole,) = self.encode(["a"], special=False), self.encode(["a"], special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def _rendered(self, messages: Messages) -> str:
        template = self._template
        try:
            return str(self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except TemplateSyntaxError as error:
            raise SourceError(
                "chat_template_invalid",
                f"Line {error.lineno} of the model's chat template cannot be read: {reason(error)}.",
                "Mend chat_template.jinja, or use a dataset of plain text.",
            ) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            where = f"line {line}" if (line := _template_line(error.__traceback__)) else "it"
            raise RowRefused(f"the chat template refuses it: {where}: {reason(error)}") from error

    @cached_property
    def _template(self) -> str:
        if self._tokenizer.chat_template is None:
            raise SourceError(
                "chat_template_missing",
                "The dataset holds conversations and the model's tokenizer has no chat template.",
                "Use a dataset of plain text, or add chat_template.jinja to the model.",
            )
        with foreign(
            "chat_template_missing",
            "None of the model's chat templates is the default",
            'Name one of them "default" in tokenizer_config.json, or use a dataset of plain text.',
        ):
            return str(self._tokenizer.get_chat_template())


_OTHER_TEXT = "Use another dataset, or put the tokenizer that belongs to the model beside its weights."


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; no download, no code of the model's.

    Raises SourceError: `tokenizer_missing`; `tokenizer_invalid` for files that cannot be read, as those of a
    later version.
    """
    with foreign("tokenizer_missing", "The model's folder cannot be read"):
        found = sorted(path.name for path in source.iterdir() if _TOKENIZER_FILES.fullmatch(path.name))
    if not found:
        raise SourceError(
            "tokenizer_missing",
            f"There is no tokenizer in {source.name!r}.",
            "Put the model's tokenizer files beside its weights.",
        )
    with foreign(
        "tokenizer_invalid",
        f"The model's tokenizer ({', '.join(found[:5])}) cannot be read",
        f"Download it again, or save it with tokenizers {tokenizers.__version__} or an earlier version.",
    ):
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception:  # of config.json perhaps, of which a tokenizer needs no more than the model_type
            config = PreTrainedConfig.from_pretrained(source, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(source, config=config, **options)
    return tokenizer


def _parts(text: str) -> Iterator[str]:
    """A text cut in front of single spaces, where tokens end anyway."""
    begin = 0
    while begin < len(text):
        end = begin + LONGEST_PART
        if end < len(text):
            places = range(end, begin + LONGEST_PART // 2, -1)
            end = next((place for place in places if _is_single_space(text, place)), end)
        yield text[begin:end]
        begin = end


def _is_single_space(text: str, place: int) -> bool:
    before, here, after = text[place - 1], text[place], text[place + 1 : place + 2]
    return here.isspace() and not before.isspace() and not after.isspace()


def _template_line(trace: TracebackType | None) -> int | None:
    """The line of the template that an error came from: Jinja puts templates into tracebacks as files."""
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
