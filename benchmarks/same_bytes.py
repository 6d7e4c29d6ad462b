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
from pathlib import Path

from benchmarks.console import say
from tests.support.models import tiny_dataset, tiny_model

ROOT = Path(__file__).parent.parent
_MODELS = ("llama", "gemma2", "qwen3_moe", "deepseek_v3")

Digests = dict[str, dict[str, str]]


def main() -> int:
    """Returns 1 where a file differs."""
    revision = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs")
        for name in _MODELS:
            tiny_model(inputs / name, name)
        tiny_dataset(inputs / "texts.jsonl")
        older = Path(scratch, "older")
        _git("worktree", "add", "--quiet", "--detach", str(older), revision)
        try:
            before, now = (_digests(tree, inputs, Path(scratch, f"by_{tree.name}")) for tree in (older, ROOT))
        finally:
            _git("worktree", "remove", "--force", str(older))
    differing = [case for case, files in before.items() if now.get(case) != files]
    compared = sum(map(len, before.values()))
    refused = sum("refused" in files for files in before.values())
    say(f"{len(before)} cases ({refused} refused), {compared} files; {len(differing)} cases differ")
    for case in differing:
        files = sorted({*before[case], *now.get(case, {})})
        names = [name for name in files if now.get(case, {}).get(name) != before[case].get(name)]
        say(f"  {case}: {', '.join(names)}")
    return 1 if differing else 0


def _digests(tree: Path, inputs: Path, outputs: Path) -> Digests:
    """What the engine in `tree` writes for every recipe, by case and file."""
    command = [sys.executable, str(ROOT / "benchmarks" / "every_recipe.py"), str(inputs), str(outputs)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Digests = json.loads(printed.splitlines()[-1])
    return found


def _git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
