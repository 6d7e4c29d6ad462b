"""`python -m benchmarks.gpu`: the engine on a GPU, timed, measured and compared with the CPU.

    python -m benchmarks.gpu                                a card, cuda:0
    python -m benchmarks.gpu --device cpu --tiny            whether it runs at all, in seconds
    python -m benchmarks.gpu --device fake --tiny           on the tests' pretended GPU: launches and syncs

Needs this repository, torch 2.11 or later, Transformers 5.17 or later and the other libraries of the engine;
no network, and nothing of the service. It makes its models and its text itself.

large    Llama 3 8B's shape, a few layers: seconds a phase, peak memory beside the estimate
small    a narrow Llama: every recipe on both devices, errors and perplexities side by side; a run that is cut
         and goes on; text that the model writes itself
experts  a narrow Mixtral, the same comparison

Of small and experts on a GPU also what the second layer costs: launches, syncs and copies to the device,
counted by torch's profiler. That takes time, so the seconds of large are the ones to look at.

Writes gpu.md and gpu.json into --out as it goes, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.console import say
from benchmarks.random_llama import make
from compression.events import Event, LayerSolved
from compression.machine.arithmetic import choose, resolve_device
from compression.pipeline import compress
from compression.planning.memory import estimate
from compression.planning.planner import plan
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.report import Report
from tests.support.fake_gpu import Counts, FakeGpu
from tests.support.models import tiny_dataset

RECIPES: Mapping[str, list[dict[str, Any]]] = {
    "rtn FP8_DYNAMIC": [{"type": "rtn", "scheme": "FP8_DYNAMIC"}],
    "gptq W4A16": [{"type": "gptq", "scheme": "W4A16"}],
    "rtn NVFP4": [{"type": "rtn", "scheme": "NVFP4"}],
    "awq W4A16": [{"type": "awq", "scheme": "W4A16"}],
}
RESUMED = "gptq W4A16"
PHASES = ("read", "generate", "forward", "gram", "solve", "evaluate", "write", "verify")
SIZES: Mapping[str, dict[str, Any]] = {
    "large": {"hidden": 4096, "intermediate": 14336, "kv_heads": 8, "head_dim": 128, "vocab": 128_256},
    "small": {"hidden": 1024, "intermediate": 2816, "kv_heads": 4, "vocab": 512, "layers": 2},
    "experts": {"hidden": 512, "intermediate": 512, "kv_heads": 2, "vocab": 512, "layers": 2, "experts": 8},
}
TINY: Mapping[str, dict[str, Any]] = {
    "large": {"hidden": 128, "intermediate": 256, "kv_heads": 2, "head_dim": 32, "vocab": 512},
    "small": {"hidden": 128, "intermediate": 128, "kv_heads": 1, "vocab": 512, "layers": 2},
    "experts": {"hidden": 128, "intermediate": 128, "kv_heads": 1, "vocab": 512, "layers": 2, "experts": 3},
}


@dataclass(frozen=True)
class Row:
    """One run. relative_error: the mean over its linears. peak_bytes, estimated_bytes: of the GPU, 0 on the
    CPU; the estimate counts the CUDA context, the peak tensors only. layer: what the second layer cost."""

    model: str
    recipe: str
    device: str
    seconds: float
    phases: Mapping[str, float]
    peak_bytes: int
    reserved_bytes: int
    estimated_bytes: int
    relative_error: float | None
    perplexity_original: float | None
    perplexity_compressed: float | None
    layer: Counts | None = None
    note: str = ""


@dataclass
class Bench:
    """All runs of one call, and where they are written."""

    device: str
    out: Path
    folder: Path
    texts: Path
    samples: int
    length: int
    rows: list[Row] = field(default_factory=list)

    @property
    def calibration(self) -> Calibration:
        return Calibration(num_calibration_samples=self.samples, max_seq_length=self.length)

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(num_samples=max(2, self.samples // 8))

    def run(
        self,
        model: str,
        recipe: str,
        device: str,
        *,
        output: str = "out",
        dataset: str | None = None,
        note: str = "",
    ) -> Report:
        """Compress, and keep a row of it. output: a folder, which is removed unless it has a name."""
        steps, given = Recipe.model_validate(RECIPES[recipe]), dataset or {"path": str(self.texts)}
        settings: dict[str, Any] = {
            "dataset": DatasetSpec.model_validate(given),
            "calibration": self.calibration,
            "evaluation": self.evaluation,
        }
        source = self.folder / model
        if device != "cpu":
            gc.collect()
            torch.cuda.empty_cache()
        counting = _LayerCounts(counts=device != "cpu" and (model != "large" or _fake is not None))
        try:
            report = compress(
                source, steps, self.folder / output, device=device, on_event=counting, **settings
            )
        finally:
            counting.close()
        if output == "out":
            shutil.rmtree(self.folder / output)
        gpu = device != "cpu"
        itemsize = torch.bfloat16.itemsize if gpu else torch.float32.itemsize
        workload = plan(source, steps, **settings).workload
        evaluation = report.evaluation
        errors = [row.relative_error for row in report.modules if row.relative_error is not None]
        self.rows.append(
            Row(
                model=model,
                recipe=recipe,
                device=device,
                seconds=report.totals.seconds,
                phases=report.phases,
                peak_bytes=report.peak_gpu_bytes,
                reserved_bytes=torch.cuda.max_memory_reserved(device) if gpu else 0,
                estimated_bytes=estimate(workload, itemsize=itemsize).gpu_bytes if gpu else 0,
                relative_error=sum(errors) / len(errors) if errors else None,
                perplexity_original=evaluation.perplexity_original if evaluation else None,
                perplexity_compressed=evaluation.perplexity_compressed if evaluation else None,
                layer=counting.counts,
                note=note,
            )
        )
        say(_line(self.rows[-1]))
        self.write()
        return report

    def write(self) -> None:
        """The table and the figures, as far as they have come."""
        self.out.mkdir(parents=True, exist_ok=True)
        machine = describe(self.device)
        facts = ", ".join(f"{key}: {value}" for key, value in machine.items())
        lines = [facts, "", *_HEAD, *map(_line, self.rows), "", *_compared(self.rows)]
        (self.out / "gpu.md").write_text("\n".join(lines) + "\n")
        figures = {"machine": machine, "rows": [dataclasses.asdict(row) for row in self.rows]}
        (self.out / "gpu.json").write_text(json.dumps(figures, indent=2) + "\n")


class _LayerCounts:
    """Listens to a run, and counts what its second layer costs the device: from the end of the first on.

    On a card they are the calls of CUDA's runtime, by torch's profiler, which takes time: the large model,
    whose seconds count, is run without. The clock's waits are among them.
    """

    def __init__(self, *, counts: bool) -> None:
        self.counts: Counts | None = None
        self._wanted = counts
        self._before: Counts | profile | None = None

    def __call__(self, event: Event) -> None:
        if not isinstance(event, LayerSolved) or not self._wanted:
            return
        if event.layer == 0:
            self._before = _fake.counts() if _fake else _started()
        elif event.layer == 1 and self._before is not None:
            before = self._before
            self.close()
            if isinstance(before, Counts):
                assert _fake is not None
                self.counts = _fake.counts() - before
            else:
                self.counts = _calls(before)

    def close(self) -> None:
        """Stop a profiler that a run has left on, which had one layer or did not come to its second."""
        if isinstance(self._before, profile):
            self._before.stop()
        self._before = None


_fake: FakeGpu | None = None


def _started() -> profile:
    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()
    return profiler


def _calls(profiler: profile) -> Counts:
    """Calls of CUDA's runtime and driver, by what they do."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    names = Counter(event.name() for event in results.events())
    called = {name: count for name, count in names.items() if name.startswith("cu")}
    return Counts(
        launches=sum(count for name, count in called.items() if "Launch" in name),
        syncs=sum(count for name, count in called.items() if "Synchronize" in name),
        copies=sum(count for name, count in names.items() if name.startswith("Memcpy HtoD")),
    )


def describe(device: str) -> dict[str, str]:
    """What the figures were taken on."""
    there = choose(device, "BF16")
    return {
        "device": device,
        "kernels": there.capability,
        "compute dtype": there.compute_dtype,
        "pretended": "yes" if _fake else "no",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cut_and_resumed(bench: Bench, device: str) -> None:
    """A run that is stopped behind its first layer gives, when it goes on, the bytes of one that is not."""

    def stop(event: Event) -> None:
        if isinstance(event, LayerSolved):
            raise KeyboardInterrupt

    bench.run("small", RESUMED, device, output="whole")
    steps = Recipe.model_validate(RECIPES[RESUMED])
    dataset = DatasetSpec(path=str(bench.texts))
    with suppress(KeyboardInterrupt):
        compress(
            bench.folder / "small",
            steps,
            bench.folder / "cut",
            device=device,
            dataset=dataset,
            calibration=bench.calibration,
            evaluation=bench.evaluation,
            on_event=stop,
        )
    report = bench.run("small", RESUMED, device, output="cut", note="resumed behind layer 0")
    whole, cut = (
        {p.name: p.read_bytes() for p in (bench.folder / n).glob("*.safetensors")} for n in ("whole", "cut")
    )
    if whole != cut or report.bytes_may_differ:
        raise SystemExit("A run that was cut and went on gave other bytes than one that was not.")
    for name in ("whole", "cut"):
        shutil.rmtree(bench.folder / name)


def measure(bench: Bench, models: list[str], *, compare: bool) -> None:
    """Every run, in the order of what is lost if the time is not enough for all."""
    device = bench.device
    if "small" in models:
        cut_and_resumed(bench, device)
        bench.run("small", RESUMED, device, dataset="self", note="text by the model")
        for recipe in RECIPES:
            if recipe != RESUMED:
                bench.run("small", recipe, device)
    if "experts" in models:
        bench.run("experts", "gptq W4A16", device)
    if "large" in models:
        for recipe in RECIPES:
            bench.run("large", recipe, device)
    if compare and device != "cpu":
        for model, recipes in (("small", list(RECIPES)), ("experts", ["gptq W4A16"])):
            for recipe in recipes if model in models else ():
                bench.run(model, recipe, "cpu")


_HEAD = [
    f"| model | recipe | device | s | {' | '.join(PHASES)} | peak, reserved, estimate MiB | error "
    "| perplexity | launches, syncs, copies a layer | |",
    "| --- | --- | --- | ---: |" + " ---: |" * len(PHASES) + " ---: | ---: | ---: | ---: | --- |",
]


def _line(row: Row) -> str:
    phases = " | ".join(f"{row.phases.get(phase, 0.0):.2f}" for phase in PHASES)
    memory = ", ".join(f"{n / 2**20:.0f}" for n in (row.peak_bytes, row.reserved_bytes, row.estimated_bytes))
    error = "" if row.relative_error is None else f"{row.relative_error:.3e}"
    perplexity = ""
    if row.perplexity_original is not None:
        perplexity = f"{row.perplexity_original:.2f}, {row.perplexity_compressed:.2f}"
    layer = "" if row.layer is None else ", ".join(map(str, dataclasses.astuple(row.layer)))
    cells = [
        row.model, row.recipe, row.device, f"{row.seconds:.1f}", phases, memory, error, perplexity, layer,
        row.note,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _compared(rows: Sequence[Row]) -> list[str]:
    """What a GPU made beside what the CPU made of the same model and text by the same recipe."""
    on_cpu = {(row.model, row.recipe): row for row in rows if row.device == "cpu"}
    pairs = [
        (row, on_cpu[row.model, row.recipe])
        for row in rows
        if row.device != "cpu" and not row.note and (row.model, row.recipe) in on_cpu
    ]
    lines = [
        f"| {gpu.model} | {gpu.recipe} | {_ratio(gpu.relative_error, cpu.relative_error)} "
        f"| {_ratio(gpu.perplexity_original, cpu.perplexity_original)} "
        f"| {_ratio(gpu.perplexity_compressed, cpu.perplexity_compressed)} |"
        for gpu, cpu in pairs
    ]
    head = "| GPU / CPU | recipe | error | perplexity, original | perplexity, compressed |"
    return [head, "| --- | --- | ---: | ---: | ---: |", *lines] if lines else []


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.4f}" if one is not None and other else ""


@contextmanager
def _pretended(wanted: bool) -> Iterator[None]:
    global _fake
    if not wanted:
        yield
        return
    try:
        with FakeGpu() as _fake:
            yield
    finally:
        _fake = None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, cpu, or fake: the tests' pretended GPU")
    parser.add_argument("--tiny", action="store_true", help="models of a few hundred kilobytes")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--layers", type=int, default=2, help="of the large model")
    parser.add_argument("--samples", type=int, help="of calibration; 64, tiny 2")
    parser.add_argument("--length", type=int, help="tokens of a sample; 512, tiny 64")
    parser.add_argument("--without-cpu", action="store_true", help="no runs on the CPU to compare with")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="of gpu.md and gpu.json")
    options = parser.parse_args(arguments)
    pretended = options.device == "fake"
    sizes = {name: dict(size) for name, size in (TINY if options.tiny else SIZES).items()}
    sizes["large"]["layers"] = options.layers
    with tempfile.TemporaryDirectory() as scratch, _pretended(pretended):
        folder = Path(scratch)
        device = resolve_device("cuda:0" if pretended else options.device)
        for name in options.models:
            say(f"making {name}: {sizes[name]}")
            make(folder / name, **sizes[name])
        samples = options.samples or (2 if options.tiny else 64)
        length = options.length or (64 if options.tiny else 512)
        texts = tiny_dataset(folder / "texts.jsonl", documents=40 + samples * length // 200)
        bench = Bench(device, options.out, folder, texts, samples, length)
        measure(bench, options.models, compare=not options.without_cpu)
    say(f"written to {options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
