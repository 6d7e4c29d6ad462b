"""From command-line options to the body of POST /v1/jobs. The server checks the values."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from compression.peer_recipe import load_recipe_yaml
from compression.recipe import DatasetSpec

if TYPE_CHECKING:
    from api.client.types import JobSubmit

_OPTION_OF = {"config": "dataset-config", "split": "dataset-split"}


class BadOptions(Exception):
    """Options that contradict each other or a file that is not what its option takes."""


@dataclass(frozen=True)
class JobOptions:
    """What `bitmill submit` takes. None: not given, the server's default."""

    model: str
    dataset: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    scheme: str | None = None
    method: str | None = None
    observer: str | None = None
    group_size: str | None = None
    targets: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    strict: bool = False
    recipe: Path | None = None
    num_calibration_samples: int | None = None
    max_seq_length: int | None = None
    packing: bool | None = None
    seed: int | None = None
    max_dropped_share: float | None = None
    evaluation: bool = True
    num_evaluation_samples: int | None = None
    max_perplexity_ratio: float | None = None
    require: str | None = None
    device_class: str | None = None
    priority: int | None = None
    name: str | None = None
    labels: list[str] = field(default_factory=list)
    max_runtime_seconds: int | None = None
    max_queue_seconds: int | None = None
    callback: str | None = None
    cache: bool = True
    output: str | None = None


def body(options: JobOptions) -> JobSubmit:
    """The JSON body, with only what was given.

    Raises:
        BadOptions: nothing was sent.
    """
    given = _given(
        model=_server_path(options.model),
        dataset=_dataset(options),
        scheme=options.scheme,
        method=options.method,
        observer=options.observer,
        group_size=_group_size(options.group_size),
        targets=options.targets or None,
        ignore=options.ignore or None,
        strict=options.strict or None,
        recipe=None if options.recipe is None else _recipe(options.recipe),
        calibration=_given(
            num_calibration_samples=options.num_calibration_samples,
            max_seq_length=options.max_seq_length,
            packing=options.packing,
            seed=options.seed,
            max_dropped_share=options.max_dropped_share,
        ),
        evaluation=_given(
            enabled=None if options.evaluation else False, num_samples=options.num_evaluation_samples
        ),
        quality_gate=_given(max_perplexity_ratio=options.max_perplexity_ratio),
        require=options.require,
        resources=_given(device_class=options.device_class),
        priority=options.priority,
        name=options.name,
        labels=dict(_label(text) for text in options.labels),
        max_runtime_seconds=options.max_runtime_seconds,
        max_queue_seconds=options.max_queue_seconds,
        callback=options.callback,
        cache=None if options.cache else "bypass",
        output=options.output,
    )
    return cast("JobSubmit", given)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and value != {}}


def _server_path(text: str) -> str:
    """A path that exists is made absolute: the server has another working directory."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() else text


def _dataset(options: JobOptions) -> dict[str, Any] | None:
    details = _given(
        config=options.dataset_config,
        split=options.dataset_split,
        text_column=options.text_column,
        messages_column=options.messages_column,
    )
    if options.dataset is None:
        if details:
            names = ", ".join(f"--{_OPTION_OF.get(name, name.replace('_', '-'))}" for name in details)
            raise BadOptions(f"{names} describe a --dataset, and none is given.")
        return None
    name = options.dataset
    spec = DatasetSpec.model_validate(name if name == "self" else _server_path(name))
    return {**spec.model_dump(include={"path", "hub", "s3", "generated"}, exclude_none=True), **details}


def _group_size(text: str | None) -> int | str | None:
    """A number, or the word as it is, for the server to check."""
    return int(text) if text is not None and text.isdecimal() else text


def _recipe(path: Path) -> Any:
    """A recipe file, ours or LLM Compressor's: YAML, which includes JSON."""
    try:
        return load_recipe_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadOptions(f"--recipe {path}: {error}") from error


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BadOptions(f"--label {json.dumps(text)} is not NAME=VALUE.")
    return name, value
