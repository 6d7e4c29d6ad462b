"""Which modules a recipe's targets and ignore lists mean.

A pattern is an exact module name, the class name `Linear`, or `re:` and a regular expression that is
matched from the start of the name (re.match), as compressed-tensors does. Patterns come with requests and
run in the control plane, so one that could backtrack for seconds is refused before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compression.errors import Problem

MAX_PATTERN_LENGTH = 500
MAX_EXPRESSIONS = 256
"""Regular expressions in one list."""
MAX_STEPS = 20_000_000
"""Bound on the ways in which an expression can match a name: four wildcards, three and a choice of 70, ..."""

_NAME_LENGTH = 64
_DIGITS_LENGTH = 4

_TOKENS = re.compile(
    r"""
    (?P<refused>\\[1-9]|\(\?P=|\(\?\(|\(\?\#|\(\?[a-zA-Z]*x)
  | (?P<open>\((?:\?(?:P<\w+>|<?[=!]|[:>]|[a-zA-Z-]+:|[a-zA-Z]+(?=\))))?)
  | (?P<close>\))
  | (?P<repeat>[*+?]|\{\d*,?\d*\})[?+]?
  | (?P<choice>\|)
  | (?P<digit>\\d|\[0-9\]|\d)
  | (?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)
    """,
    re.VERBOSE | re.DOTALL,
)


def matcher(patterns: Iterable[str]) -> Callable[[str, bool], bool]:
    """A function of (module name, is it a linear) that says whether any pattern matches."""
    tests = [_test(pattern) for pattern in patterns]
    return lambda name, linear: any(test(name, linear) for test in tests)


def _test(pattern: str) -> Callable[[str, bool], bool]:
    if pattern.startswith("re:"):
        expression = re.compile(pattern.removeprefix("re:"))
        return lambda name, _: expression.match(name) is not None
    if pattern == "Linear":
        return lambda _, linear: linear
    return lambda name, _: name == pattern


def pattern_problem(pattern: str, pointer: str) -> Problem | None:
    """`pattern_invalid` when the pattern cannot be used, else None."""
    if not pattern.startswith("re:"):
        return None
    text = pattern.removeprefix("re:")
    reason = _too_costly(text) or _malformed(text)
    if not reason:
        return None
    return Problem(
        "pattern_invalid",
        f"The pattern {pattern[:100]!r} cannot be used: {reason}.",
        r"Write it as plainly as re:.*mlp\..*_proj, or list module names.",
        pointer,
    )


def _malformed(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is not a regular expression ({error})"
    return ""


@dataclass
class _OpenGroup:
    """An open group: how many alternatives it has so far, and whether anything in it repeats or chooses."""

    alternatives: int = 1
    branches: bool = False


def _too_costly(text: str) -> str:
    """Why the expression could take too long, or nothing.

    The ways to match are at most the product of what each repeat and each choice allows. A repeat around a
    group that itself repeats or chooses has no such bound, nor have back-references.
    """
    if len(text) > MAX_PATTERN_LENGTH:
        return f"it is longer than {MAX_PATTERN_LENGTH} characters"
    steps = 1
    groups = [_OpenGroup()]
    closed: _OpenGroup | None = None  # the group that ended just before
    span = _NAME_LENGTH  # how far a repeat of the last token can reach
    for token in _TOKENS.finditer(text):
        kind = token.lastgroup
        if kind == "refused":
            return "it has a back-reference, a condition, a comment or the flag x"
        if kind == "repeat":
            if closed is not None and closed.branches and token["repeat"] != "?":
                return "it repeats a group that itself repeats or chooses"
            groups[-1].branches = True
            steps *= 2 if token["repeat"] == "?" else span
        elif kind == "choice":
            groups[-1].alternatives += 1
            groups[-1].branches = True
        elif kind == "open":
            groups.append(_OpenGroup())
        closed = None
        if kind == "close" and len(groups) > 1:
            closed = groups.pop()
            steps *= closed.alternatives
            groups[-1].branches |= closed.branches
        span = _DIGITS_LENGTH if kind == "digit" else _NAME_LENGTH
    if steps * groups[0].alternatives > MAX_STEPS:
        return "it has too many wildcards and choices"
    return ""
