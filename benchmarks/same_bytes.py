"""Whether this version writes the bytes that another one wrote: every scheme by every method.

    python -m benchmarks.same_bytes REVISION

Small models are compressed twice, by the engine of this folder and by that of a revision of its history, in
processes of their own. What was written is compared file by file, and what differs is listed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.console import say
from tests.support.models import tiny_dataset, tiny_model

ROOT = Path(__file__).parent.parent
MODELS = ("llama", "gemma2", "qwen3_moe", "deepseek_v3", "llama4_text", "llava")

Digests = dict[str, dict[str, str]]


def main() -> int:
    """Returns 1 where a file differs."""
    revision = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs")
        make_inputs(inputs, MODELS)
        older = Path(scratch, "older")
        _git("worktree", "add", "--quiet", "--detach", str(older), revision)
        try:
            before, now = (digests(tree, inputs, Path(scratch, f"by_{tree.name}")) for tree in (older, ROOT))
        finally:
            _git("worktree", "remove", "--force", str(older))
    differing = differences(before, now)
    compared = sum(map(len, before.values()))
    refused = sum("refused" in files for files in before.values())
    say(f"{len(before)} cases ({refused} refused), {compared} files; {len(differing)} cases differ")
    for case, names in differing.items():
        say(f"  {case}: {', '.join(names)}")
    return 1 if differing else 0


def make_inputs(folder: Path, models: Sequence[str]) -> None:
    """A tiny model of each type, and text."""
    for name in models:
        tiny_model(folder / name, name)
    tiny_dataset(folder / "texts.jsonl")


def differences(before: Digests, now: Digests) -> dict[str, list[str]]:
    """The names of the files that differ, or are there once only, by case."""
    differing = {}
    for case in (*before, *(case for case in now if case not in before)):
        one, other = before.get(case, {}), now.get(case, {})
        if one != other:
            files = sorted({*one, *other})
            differing[case] = [name for name in files if one.get(name) != other.get(name)]
    return differing


def digests(tree: Path, inputs: Path, outputs: Path, recipe: str | None = None) -> Digests:
    """What the engine in `tree` writes for every recipe, or for one, by case and file."""
    command = [sys.executable, str(ROOT / "benchmarks" / "every_recipe.py"), str(inputs), str(outputs)]
    command += [] if recipe is None else [recipe]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Digests = json.loads(printed.splitlines()[-1])
    return found


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
