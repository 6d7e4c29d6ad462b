"""What else one checkpoint can be, measured by the engine itself: the second table of docs/results.md.

Several schemes in one model, keys and values in fp8, experts, and a decoder beside a vision tower. The
figures are those that every run reports: both models side by side on held-out documents of the calibration's
text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import sides
from benchmarks.console import say
from benchmarks.inputs import Inputs, Size, prepare, prepare_small

EXPERTS = 8
HELD_OUT = 64
"""Blocks that both models are compared on."""
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}

Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Variant:
    """A model and what becomes of it, in the words of a recipe file."""

    name: str
    model: str
    steps: Steps


def with_tower(work: Path, size: Size, *, decoder: Path) -> Inputs:
    """A LLaVA around the small model, with a random tower, which no text comes by."""
    inputs = prepare_small(decoder, size)
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "model"
    if not folder.exists():
        small = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.bfloat16)
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=TOWER, text_config=small.config.to_dict(), tie_word_embeddings=True
        )
        whole = LlavaForConditionalGeneration(config).bfloat16()
        whole.model.language_model.load_state_dict(small.model.state_dict())
        whole.tie_weights()
        whole.save_pretrained(folder)
        for file in inputs.model.glob("token*"):
            shutil.copy2(file, folder)
    return Inputs(**{**asdict(inputs), "model": folder})


def with_experts(work: Path, size: Size) -> Inputs:
    """The small model as a Mixtral, trained for a third of the steps, which are longer."""
    return prepare_small(work, replace(size, steps=-(-size.steps // 3)), experts=EXPERTS)


FP8 = {"num_bits": 8, "type": "float"}
MODELS: dict[str, tuple[str, Callable[[Path, Size], Inputs]]] = {
    "smollm2": ("SmolLM2-135M", prepare),
    "small-experts": (f"small Mixtral, {EXPERTS} experts", with_experts),
    "small-llava": ("LLaVA around the small Llama", lambda work, size: with_tower(
        work, size, decoder=work.parent / "small"
    )),
}  # fmt: skip
VARIANTS = (
    Variant("W4A16", "smollm2", [{"type": "gptq", "scheme": "W4A16", "group_size": 64}]),
    Variant(
        "FP8_DYNAMIC in the first and the last layer, W4A16 in the others",
        "smollm2",
        [
            {"type": "rtn", "scheme": "FP8_DYNAMIC", "targets": [r"re:.*layers\.0\.", r"re:.*layers\.29\."]},
            {"type": "gptq", "scheme": "W4A16", "group_size": 64},
        ],
    ),
    Variant(
        "W4A16, keys and values in fp8",
        "smollm2",
        [{"type": "gptq", "scheme": "W4A16", "group_size": 64, "kv_cache_scheme": FP8}],
    ),
    Variant(
        "SparseGPT 2:4, what is left in W8A8",
        "smollm2",
        [{"type": "sparsegpt", "mask_structure": "2:4"}, {"type": "gptq", "scheme": "W8A8"}],
    ),
    Variant("experts and attention in W4A16", "small-experts", [{"type": "gptq", "scheme": "W4A16"}]),
    Variant(
        "experts and attention in FP8_DYNAMIC", "small-experts", [{"type": "rtn", "scheme": "FP8_DYNAMIC"}]
    ),
    Variant("decoder in W4A16", "small-llava", [{"type": "gptq", "scheme": "W4A16"}]),
    Variant("decoder in W8A8", "small-llava", [{"type": "gptq", "scheme": "W8A8"}]),
)

HEAD = """\
## What else one checkpoint can be

As every run reports it: both models side by side on {blocks} held-out blocks of 512 tokens of the text that
the model was calibrated on (64 blocks). With the recipe of a row in recipe.yaml:

    python -m compression MODEL --recipe recipe.yaml --dataset TEXTS.jsonl --text-column text \\
        --num-calibration-samples 64 --max-seq-length 512 --num-evaluation-samples {blocks} --output-dir OUT

Experts: calibration tokens that the router sent to one, of all layers. The tower of the LLaVA is random: text
does not pass through it, and what matters here is that its bytes are those of the source.
"""


def measure(work: Path, size: Size, wanted: Callable[[str], bool]) -> None:
    """Runs each variant that is wanted and has not been run; keeps what it reports in `work`/variants."""
    for number, variant in enumerate(VARIANTS):
        file = _file(work, number)
        if not wanted(f"variants/{variant.model}") or _read(work, number) is not None:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        inputs = MODELS[variant.model][1](work / variant.model, size)
        recipe, output = file.with_suffix(".yaml"), file.with_suffix("")
        recipe.write_text(yaml.safe_dump({"steps": list(variant.steps)}))
        command = [*sides.ours(inputs, recipe, output), "--num-evaluation-samples", str(HELD_OUT)]
        run = sides.timed(output.name, command, file.parent)
        result = {"variant": asdict(variant), "run": asdict(run), "machine": sides.machine()}
        result |= _found(inputs.model, output)
        shutil.rmtree(output)
        file.write_text(json.dumps(result, indent=2) + "\n")
        say(f"{variant.name}: ratio {result['evaluation']['perplexity_ratio']:.4f}")


def _found(source: Path, output: Path) -> dict[str, Any]:
    """What a published checkpoint says of itself, and whether its tower is the source's."""
    record = json.loads((output / "bitmill.json").read_text())
    report = record["report"]
    tokens = [row["tokens"] for row in report["modules"] if row["tokens"] is not None]
    found = {"evaluation": report["evaluation"], "totals": report["totals"], "tokens": tokens}
    if tower := _digests_of_tower(source):
        found["tower_kept"] = tower == _digests_of_tower(output)
        found["tower_tensors"] = len(tower)
    return found


def _digests_of_tower(folder: Path) -> dict[str, str]:
    digests = {}
    for shard in folder.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if "vision_tower" in name:
                raw = tensor.contiguous().view(torch.uint8)
                digests[name] = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    return digests


def _file(work: Path, number: int) -> Path:
    return work / "variants" / f"{number}.json"


def _read(work: Path, number: int) -> dict[str, Any] | None:
    """What was found of a variant; None where it was not run, or was another one."""
    file = _file(work, number)
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found["variant"] == json.loads(json.dumps(asdict(VARIANTS[number]))) else None


def section(work: Path) -> list[str]:
    """The table, in Markdown."""
    return [
        HEAD.format(blocks=HELD_OUT),
        "| model | what it becomes | recipe | MB | perplexity | ratio | |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
        *(_line(variant, _read(work, number)) for number, variant in enumerate(VARIANTS)),
    ]


def _line(variant: Variant, found: dict[str, Any] | None) -> str:
    title = MODELS[variant.model][0]
    recipe = yaml.safe_dump(list(variant.steps), default_flow_style=True, width=1000).strip()
    if found is None:
        return f"| {title} | {variant.name} | `{recipe}` | | not run | | |"
    totals, measured = found["totals"], found["evaluation"]
    sizes = f"{totals['source_bytes'] / 1e6:.1f} to {totals['output_bytes'] / 1e6:.1f}"
    both = f"{measured['perplexity_original']:.3f} to {measured['perplexity_compressed']:.3f}"
    ratio = f"{measured['perplexity_ratio']:.4f} ± {measured['perplexity_ratio_stderr']:.4f}"
    notes = "; ".join(_notes(found))
    return f"| {title} | {variant.name} | `{recipe}` | {sizes} | {both} | {ratio} | {notes} |"


def _notes(found: dict[str, Any]) -> Iterator[str]:
    if tokens := found["tokens"]:
        yield f"{min(tokens):,} to {max(tokens):,} tokens an expert, median {median(tokens):,.0f}"
    if "tower_kept" in found:
        kept = "the source's bytes" if found["tower_kept"] else "**not** the source's bytes"
        yield f"{found['tower_tensors']} tensors of the tower have {kept}"
