"""What both models are asked, and what a sensible answer says."""

from __future__ import annotations

import re
from typing import NamedTuple


class Question(NamedTuple):
    """A chat message, and a regular expression that every sensible answer begins with, case aside."""

    text: str
    sensible: str

    def answered_by(self, answer: str) -> bool:
        """Whether that is a sensible answer."""
        return re.match(self.sensible, answer, re.IGNORECASE | re.DOTALL) is not None


QUESTIONS = (
    Question("What is the capital of France?", r"the capital of france is paris\."),
    Question("What is the plural of child?", r"the plural of child is children\b"),
    Question("What is 2 + 2?", r".*\b4\."),
    Question(
        "Write a Python function that returns the square of a number.", r".*def \w+\((\w+)\):.*return \1 ?\*"
    ),
    Question(
        "What is photosynthesis?", r".*photosynthesis is .*process.*plants.*(light|energy|carbon dioxide)"
    ),
)
