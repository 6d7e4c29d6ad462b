"""`python -m compression`: compress one model on this machine, without the service."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from compression.boundary import unexpected
from compression.errors import CompressionError, UnexpectedError
from compression.events import (
    Event,
    FetchProgress,
    GenerationProgress,
    LayerReplayed,
    LayerSolved,
    PhaseChanged,
    WarningRaised,
)
from compression.methods import makers
from compression.peer_recipe import load_recipe_yaml
from compression.planning.memory import ACTIVATION_BUDGET_BYTES
from compression.recipe import Calibration, DatasetSpec, Evaluation, Recipe
from compression.report import Report
from compression.schemes import SCHEMES, SPARSE_SCHEMES

console = Console(stderr=True)


def parser() -> argparse.ArgumentParser:
    """Options and their defaults; the same words as in the REST body and in Python."""
    defaults = Calibration()
    result = argparse.ArgumentParser("python -m compression", description=__doc__)
    result.add_argument(
        "source",
        metavar="SOURCE",
        help="folder with config.json and safetensors files, here or s3://bucket/folder, or "
        "owner/name[@revision] on the Hub",
    )
    result.add_argument("--output-dir", required=True, help="folder to make; must not exist yet")
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--scheme", help=", ".join([*SCHEMES, *SPARSE_SCHEMES]))
    what.add_argument("--recipe", help="a recipe file, Bitmill's or LLM Compressor's, instead of a scheme")
    result.add_argument(
        "--method",
        choices=[*makers(sparse=False), *makers(sparse=True)],
        help="default: gptq for int and fp4 weights with data",
    )
    result.add_argument("--observer", choices=["minmax", "mse", "imatrix", "gram"])
    result.add_argument("--group-size", type=lambda value: value if value == "auto" else int(value))
    result.add_argument("--ignore", action="append", help="module name or re:pattern; may be repeated")
    result.add_argument(
        "--strict", action="store_true", help="an --ignore that matches no module is an error, not a warning"
    )
    result.add_argument("--dataset", help=".jsonl, .parquet, .csv or .txt file, a name on the Hub, or self")
    result.add_argument("--dataset-config", help="part of a dataset on the Hub")
    result.add_argument("--dataset-split", help="split of it; train unless given")
    result.add_argument("--text-column", help="column with the text; found unless given")
    result.add_argument("--messages-column", help="column with chat messages")
    result.add_argument("--num-calibration-samples", type=int, default=defaults.num_calibration_samples)
    result.add_argument("--max-seq-length", type=int, default=defaults.max_seq_length)
    result.add_argument(
        "--no-packing", action="store_true", help="one truncated document a sample, not a block of several"
    )
    result.add_argument("--seed", type=int, default=defaults.seed)
    result.add_argument(
        "--max-dropped-share",
        type=float,
        default=defaults.max_dropped_share,
        help="share of the rows read that may be unusable, and are dropped",
    )
    result.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    result.add_argument("--activation-budget-bytes", type=int, default=ACTIVATION_BUDGET_BYTES)
    result.add_argument("--no-evaluation", action="store_true")
    result.add_argument("--num-evaluation-samples", type=int)
    result.add_argument("--no-self-check", action="store_true", help="do not read the result back")
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when the run failed, with its code on stderr; 2 for bad options; 130 for Ctrl-C."""
    options = parser().parse_args(argv)
    try:
        recipe = _recipe(options)
        dataset = None
        if options.dataset is not None:
            told = DatasetSpec.model_validate(options.dataset)
            details = {
                "config": options.dataset_config,
                "split": options.dataset_split,
                "text_column": options.text_column,
                "messages_column": options.messages_column,
            }
            dataset = DatasetSpec.model_validate({**told.model_dump(), **details})
        calibration = Calibration(
            num_calibration_samples=options.num_calibration_samples,
            max_seq_length=options.max_seq_length,
            packing=not options.no_packing,
            seed=options.seed,
            max_dropped_share=options.max_dropped_share,
        )
        evaluation = Evaluation(enabled=not options.no_evaluation, num_samples=options.num_evaluation_samples)
        report = _run(options, recipe, dataset, calibration, evaluation)
    except ValidationError as error:
        _say("invalid_request", str(error))
        return 2
    except KeyboardInterrupt:
        _say("interrupted", "The same command goes on with the first unfinished layer.")
        return 130
    except Exception as error:
        ours = error if isinstance(error, CompressionError) else unexpected(error)
        if isinstance(ours, UnexpectedError):
            traceback.print_exception(error)
        _say(ours.code, f"{ours.message} {ours.hint}")
        return 1
    sys.stdout.write(json.dumps(_summary(report, Path(options.output_dir)), indent=2) + "\n")
    return 0


def _say(code: str, text: str) -> None:
    """A line on stderr; brackets in names of files are no markup."""
    console.print(Text.assemble((code, "red"), " ", text.strip()), soft_wrap=True)


def _recipe(options: argparse.Namespace) -> Recipe:
    of_scheme = {name: getattr(options, name) for name in ("observer", "group_size", "ignore")}
    if options.recipe is None:
        has_dataset = options.dataset is not None
        return Recipe.from_short(
            options.scheme,
            method=options.method,
            has_dataset=has_dataset,
            strict=options.strict,
            **of_scheme,
        )
    told = (("method", options.method), ("strict", options.strict or None), *of_scheme.items())
    given = [name for name, value in told if value is not None]
    if given:
        parser().error(f"--recipe says all of it: leave out --{given[0].replace('_', '-')}")
    try:
        return Recipe.model_validate(load_recipe_yaml(Path(options.recipe).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser().error(f"--recipe {options.recipe}: {error}")


def _run(
    options: argparse.Namespace,
    recipe: Recipe,
    dataset: DatasetSpec | None,
    calibration: Calibration,
    evaluation: Evaluation,
) -> Report:
    with Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:
        bar = progress.add_task("loading", total=None, note="")

        def show(event: Event) -> None:
            match event:
                case PhaseChanged("plan"):
                    progress.update(bar, description="plan", total=None, completed=0, note="")
                case PhaseChanged(phase):
                    progress.update(bar, description=phase)
                case FetchProgress(_, name, done, total):
                    progress.update(bar, total=total, completed=done, note=name)
                case GenerationProgress(done, total):
                    progress.update(bar, total=total, completed=done, note="tokens")
                case LayerSolved(layer, total, error):
                    note = "" if error is None else f"relative error {error:.2e}"
                    progress.update(bar, total=total, completed=layer + 1, note=note)
                case LayerReplayed(layer, total):
                    progress.update(bar, total=total, completed=layer + 1, note="replayed")
                case WarningRaised(code, message):
                    progress.console.print(Text.assemble((code, "yellow"), " ", message), soft_wrap=True)

        from compression.pipeline import compress  # torch: only once the options are known to be good

        return compress(
            options.source,
            recipe,
            options.output_dir,
            dataset=dataset,
            calibration=calibration,
            evaluation=evaluation,
            device=options.device,
            activation_budget_bytes=options.activation_budget_bytes,
            on_event=show,
            self_check=not options.no_self_check,
        )


def _summary(report: Report, output_dir: Path) -> dict[str, object]:
    """What a person or script wants at the end; the modules' rows are in bitmill.json."""
    result = report.to_dict()
    del result["modules"]
    return {"output_dir": str(output_dir), **result}


if __name__ == "__main__":
    sys.exit(main())
