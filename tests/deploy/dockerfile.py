"""As much of the Dockerfile language as ours uses."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continuation lines joined. `value` is what follows the keyword."""

    keyword: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value split as a shell would; the exec form (a JSON array) gives its elements."""
        return list(json.loads(self.value)) if self.value.startswith("[") else shlex.split(self.value)


@dataclass(frozen=True)
class Stage:
    """What stands between one FROM and the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, keyword: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]


def parse(path: Path) -> dict[str, Stage]:
    """Stages by name, in the order of the file."""
    stages: dict[str, Stage] = {}
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.keyword == "FROM":
            base, as_, name = instruction.words
            assert as_ == "AS", f"{base} has no name"
            current = stages[name] = Stage(name, base)
        else:
            current.instructions.append(instruction)
    return stages


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [
        Instruction(keyword, value.strip()) for keyword, _, value in (line.partition(" ") for line in joined)
    ]
