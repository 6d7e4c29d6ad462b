"""Every error that Bitmill's engine raises on purpose.

    CompressionError        code, message, hint; the base to catch
    ├── PlanError           the job cannot succeed: refused before any compute, with every problem found
    ├── SourceError         the checkpoint or the dataset cannot be read, or changed while it was read
    ├── NumericalError      NaN or Inf in weights or activations, or a Gram matrix beyond dampening
    ├── ResourceError       the machine lacks something: disk, memory budget, device
    ├── SelfCheckError      what was written is not what was meant
    └── UnexpectedError     nobody foresaw it: a fault of Bitmill's, with the type and message of its cause

Nothing else comes out of the engine (compression/boundary.py). A code is stable: programs branch on it, so it
is never renamed. The hint says what to do.
This module imports nothing, so that the control plane can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One reason why a job cannot run.

    `pointer` is a JSON pointer (RFC 6901) into the request body, where one field is to blame.
    """

    code: str
    message: str
    hint: str = ""
    pointer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", _encodable(self.message))


def some(names: Sequence[str]) -> str:
    """The first five of many names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _encodable(text: str) -> str:
    """Half characters as escapes: messages quote names of strangers, and are printed and stored as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class CompressionError(Exception):
    """Base of all deliberate errors: a stable `code`, a `message` and a `hint` that says what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        message = _encodable(message)
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


class PlanError(CompressionError):
    """The job cannot succeed. `problems` holds every reason found, the first of which is the error's own."""

    def __init__(self, *problems: Problem) -> None:
        first = problems[0]
        super().__init__(first.code, first.message, first.hint)
        self.problems = problems


class SourceError(CompressionError):
    """The checkpoint or the dataset is unreadable, malformed, or changed while it was read."""


class NumericalError(CompressionError):
    """NaN or Inf where a finite number must be; the message names the module."""


class ResourceError(CompressionError):
    """The machine lacks disk, memory or the device that was asked for."""


class SelfCheckError(CompressionError):
    """A written checkpoint does not hold what the engine meant to write; the message names the module."""


class UnexpectedError(CompressionError):
    """`engine_error`: what nobody foresaw. Its cause is chained; the same work would end the same again."""
