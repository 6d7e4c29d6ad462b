"""Checkpoints in vLLM, all in one process, since that takes 20 seconds to start."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

PASSAGE = (
    "The old mill stood at the end of the village, where the river turned towards the sea. In the winter its "
    "wheel was still, and children from the school came to skate on the pond. Every spring the miller opened "
    "the gates, the water rushed in, and the stones began to turn again. People brought their grain from the "
    "farms in the valley and waited in the yard, talking about the weather and the price of bread."
)


@dataclass(frozen=True)
class Seen:
    """What vLLM made of a checkpoint, as vllm_answer.py has it."""

    error: str = ""
    answer: str = ""
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Run:
    amx: bool
    exact_int8: bool
    seen: Mapping[str, Seen]


def in_vllm(checkpoints: Mapping[str, Path], conversation: Sequence[Mapping[str, str]] = ()) -> Run:
    """What the interpreter that has vLLM makes of PASSAGE, and of the conversation if there is one."""
    request = {
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
        "conversation": conversation,
        "passage": PASSAGE,
    }
    finished = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_answer.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    seen = {name: Seen(**fields) for name, fields in result.pop("seen").items()}
    return Run(**result, seen=seen)
