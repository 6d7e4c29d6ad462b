"""Models and datasets on this machine: only below the configured roots, after resolving links."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from compression.documents import SUFFIXES
from compression.errors import PlanError, Problem
from compression.recipe import DatasetSpec

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_MAX_ENTRIES = 10_000
_KINDS = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"


def resolve_model(model: str, roots: Sequence[Path]) -> Path:
    """The real folder of a model.

    Raises:
        PlanError: `path_not_allowed` for what is not below a root, whether or not it exists, or has a link
            inside that leaves the roots; `model_not_found` for a Hub id and for what is not there.
    """
    pointer = "/model"
    if not model.startswith("/"):
        raise PlanError(_not_a_path(model, pointer))
    folder = _resolve(model, roots, pointer)
    if not folder.is_dir():
        hint = "Give the folder that holds config.json and the safetensors files."
        raise PlanError(Problem("model_not_found", f"There is no model folder {model!r}.", hint, pointer))
    check_links(folder, roots)
    return folder


def resolve_dataset(dataset: DatasetSpec, roots: Sequence[Path]) -> DatasetSpec:
    """The same dataset with its path resolved.

    Raises:
        PlanError: `path_not_allowed`, `dataset_not_found` for what is not a file below a root, or
            `dataset_format_unsupported`.
    """
    if dataset.path is None:
        return dataset
    pointer = "/dataset"
    if not dataset.path.startswith("/"):
        raise PlanError(_not_allowed(dataset.path, "Give an absolute path.", pointer))
    file = _resolve(dataset.path, roots, pointer)
    if not file.is_file():
        hint = f"Give {_KINDS}, or the texts themselves under `texts`."
        message = f"There is no dataset file {dataset.path!r}."
        raise PlanError(Problem("dataset_not_found", message, hint, pointer))
    if file.suffix.lower() not in SUFFIXES:
        message = f"{file.name} is of another kind."
        raise PlanError(Problem("dataset_format_unsupported", message, f"Give {_KINDS}.", pointer))
    return dataset.model_copy(update={"path": str(file)})


def check_links(folder: Path, roots: Sequence[Path]) -> None:
    """Refuse a folder in which a link leads out of the roots.

    Raises:
        PlanError: `path_not_allowed`, or `too_many_files`.
    """
    seen = 0
    for where, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > _MAX_ENTRIES:
            message = f"The model folder has more than {_MAX_ENTRIES} files."
            raise PlanError(Problem("too_many_files", message, "Give the model's own folder.", "/model"))
        for name in (*folders, *files):
            path = Path(where, name)
            if path.is_symlink() and not _is_below(os.path.realpath(path), roots):
                hint = "Copy the file into the folder, or link to one below a root."
                raise PlanError(_not_allowed(str(path), hint, "/model"))


def _resolve(path: str, roots: Sequence[Path], pointer: str) -> Path:
    hint = "The server reads only below the folders of its setting BITMILL_LOCAL_ROOTS."
    if "\0" in path:
        raise PlanError(_not_allowed(path, hint, pointer))
    real = os.path.realpath(path)
    if not _is_below(real, roots):
        raise PlanError(_not_allowed(path, hint, pointer))
    return Path(real)


def _is_below(real: str, roots: Sequence[Path]) -> bool:
    return any(Path(real).is_relative_to(root) for root in roots)


def _not_allowed(path: str, hint: str, pointer: str) -> Problem:
    return Problem("path_not_allowed", f"The server may not read {path!r}.", hint, pointer)


def _not_a_path(model: str, pointer: str) -> Problem:
    if _HUB_ID.fullmatch(model):
        hint = "This server has no access to the Hub: give the absolute path of a folder below a local root."
        return Problem("model_not_found", f"There is no model {model!r} on this server.", hint, pointer)
    return _not_allowed(model, "Give the absolute path of a folder below a local root.", pointer)
