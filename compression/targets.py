"""Which modules a recipe's targets and ignore lists mean.

A pattern is an exact module name, the class name `Linear`, or `re:` and a regular expression that is
matched from the start of the name (re.match), as compressed-tensors does. Patterns come with requests, so
an expression that could take exponential time is refused before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from compression.errors import Problem

MAX_PATTERN_LENGTH = 500
MAX_REPEATS = 4
"""Unbounded repeats in one expression: the time to match a name of n characters grows as n^repeats."""


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
    reason = _too_costly(text)
    if not reason:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            reason = f"it is not a regular expression ({error})"
    if not reason:
        return None
    return Problem(
        "pattern_invalid",
        f"The pattern {pattern[:100]!r} cannot be used: {reason}.",
        r"Write it as plainly as re:.*mlp\..*_proj, or list module names.",
        pointer,
    )


def _too_costly(text: str) -> str:
    """Why the expression could take too long, or nothing.

    Backtracking explodes where a repeat stands inside a repeated group, and with back-references; a chain
    of repeats costs a power of the name's length.
    """
    if len(text) > MAX_PATTERN_LENGTH:
        return f"it is longer than {MAX_PATTERN_LENGTH} characters"
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[^\dg]", "x", text))
    if re.search(r"\\\d|\(\?P=|\(\?\(", plain):
        return "it uses back-references"
    repeats = re.findall(r"[*+]|\{\d*,?\d*\}", plain)
    if len(repeats) > MAX_REPEATS:
        return f"it has more than {MAX_REPEATS} repeats"
    branching = [False]  # for each open group: does it hold a repeat or a choice?
    previous = False  # was the character before the end of such a group?
    for character in plain:
        if character == "(":
            branching.append(False)
        elif character in "*+{" and previous:
            return "it repeats a group that itself repeats or chooses"
        elif character in "*+{?|":
            branching[-1] = True
        previous = character == ")" and len(branching) > 1 and branching.pop()
        if previous:
            branching[-1] = True
    return ""
