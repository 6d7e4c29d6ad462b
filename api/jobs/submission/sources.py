"""Models and datasets: on the Hub, in S3 below the project's prefixes, or on this machine below the
configured roots, after resolving links. And where in S3 a job's files may go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from api.errors import Unavailable
from api.projects.prefixes import S3Access
from compression.data.hub_streaming import HubDataset
from compression.errors import PlanError, Problem, SourceError
from compression.hub.client import HubClient
from compression.hub.environment import HubEnvironment
from compression.hub.headers import header_folder
from compression.hub.references import HubRef
from compression.hub.snapshots import cached_commit, fetch_model
from compression.recipe import DATASET_SUFFIXES, DatasetSpec
from compression.s3.client import S3Ref
from compression.s3.models import S3ModelRef, s3_header_folder

_NAME = re.compile(r"\w[\w.-]*")
_RETRY_SECONDS = 30
_UNREACHABLE = ("hub_unreachable", "s3_unreachable")
_MAX_ENTRIES = 10_000
_MAX_MODEL_BYTES = 2000  # more does not go into an index of PostgreSQL
_KINDS = f"a {', '.join(DATASET_SUFFIXES[:-1])} or {DATASET_SUFFIXES[-1]} file"


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    source: where the worker gets it: a real path, a name on the Hub at a commit, or a folder in S3 at a
    revision.
    folder: what is planned from; for a model that is not on this machine it may hold the headers only.
    name: of the model, for its card.
    """

    source: str
    folder: Path
    name: str


@dataclass(frozen=True)
class LocalFolders:
    """Which folders of this machine jobs may read.

    roots: models and text may lie below them. own: where the service keeps its own files, if that is a folder
    of this machine; no job may name what is in it.
    """

    roots: tuple[Path, ...]
    own: Path | None

    def have(self, real: str) -> bool:
        """Whether a resolved path may be read."""
        path = Path(real)
        if self.own is not None and path.is_relative_to(os.path.realpath(self.own)):
            return False
        return any(path.is_relative_to(root) for root in self.roots)


def resolve_model(model: str, folders: LocalFolders, access: S3Access, hub: HubEnvironment) -> ModelSource:
    """Where a model is, pinned if that is elsewhere.

    Raises:
        PlanError: `model_name_too_long`; `path_not_allowed` for what is not below a root or the
            project's prefixes, whether or not it exists, or has a link inside that leaves the roots;
            `model_not_found` for what is not there; `hub_...` for what the Hub does not give; `s3_...` and
            `model_changed` for what S3 does not give.
        Unavailable: `hub_unreachable`, `s3_unreachable`.
    """
    pointer = "/model"
    if len(model.encode()) > _MAX_MODEL_BYTES:
        hint = "Move the folder, or link to it from a shorter path."
        message = f"The model's name is longer than {_MAX_MODEL_BYTES} bytes."
        raise PlanError(Problem("model_name_too_long", message, hint, pointer))
    if model.startswith("s3://"):
        return _model_in_s3(model, access, hub)
    if ref := HubRef.parse(model):
        return _model_on_hub(ref, hub)
    if not model.startswith("/"):
        raise PlanError(_not_a_path(model, pointer))
    folder = _resolve(model, folders, pointer)
    if not folder.is_dir():
        hint = "Give the folder that holds config.json and the safetensors files."
        raise PlanError(Problem("model_not_found", f"There is no model folder {model!r}.", hint, pointer))
    check_links(folder, folders)
    return ModelSource(str(folder), folder, folder.name)


def _model_on_hub(ref: HubRef, hub: HubEnvironment) -> ModelSource:
    try:
        if hub.offline:
            folder = fetch_model(ref, hub, lambda _done, _total: None)
            return ModelSource(str(ref.at(folder.name)), folder, ref.name)
        with HubClient(hub) as client:
            commit = client.commit("model", ref)
            return ModelSource(str(commit.ref), header_folder(client, commit, hub), ref.name)
    except SourceError as error:
        raise _refusal(error, "/model") from error


def _model_in_s3(model: str, access: S3Access, hub: HubEnvironment) -> ModelSource:
    ref = S3ModelRef.parse(model)
    if ref is None:
        hint = "Give s3://bucket/folder, the folder that holds config.json and the safetensors files."
        raise PlanError(_not_allowed(model, hint, "/model"))
    _check_prefix(ref.folder, access, "/model")
    try:
        folder, pinned = s3_header_folder(ref, hub.home)
    except SourceError as error:
        raise _refusal(error, "/model") from error
    return ModelSource(str(pinned), folder, ref.name)


def resolve_dataset(
    dataset: DatasetSpec,
    folders: LocalFolders,
    access: S3Access,
    hub: HubEnvironment,
) -> DatasetSpec:
    """The same dataset with its path resolved, or its revision on the Hub. What is in S3 is pinned by the
    worker that first fetches it. What lies in the service's own store is nobody's dataset.

    Raises:
        PlanError: `path_not_allowed`, `dataset_not_found` for what is not a file below a root, or
            `hub_...` for what the Hub does not give.
        Unavailable: `hub_unreachable`.
    """
    if dataset.hub is not None:
        return _dataset_on_hub(dataset, hub)
    if dataset.s3 is not None:
        ref = S3Ref.parse(dataset.s3)
        assert ref is not None  # DatasetSpec has seen to that
        _check_prefix(ref, access, "/dataset")
        return dataset
    if dataset.path is None:
        return dataset
    pointer = "/dataset"
    if not dataset.path.startswith("/"):
        raise PlanError(_not_allowed(dataset.path, "Give an absolute path.", pointer))
    file = _resolve(dataset.path, folders, pointer)
    if not file.is_file():
        hint = f"Give {_KINDS}, or the texts themselves under `texts`."
        message = f"There is no dataset file {dataset.path!r}."
        raise PlanError(Problem("dataset_not_found", message, hint, pointer))
    return dataset.model_copy(update={"path": str(file)})


def _check_prefix(ref: S3Ref, access: S3Access, pointer: str) -> None:
    if ref.is_below(access.store_url):
        hint = "The server keeps its own files there. Copy it elsewhere."
        raise PlanError(_not_allowed(str(ref), hint, pointer))
    if not access.may_read(ref):
        hint = "It may lie below the project's own prefixes, or without such below BITMILL_S3_PREFIXES."
        raise PlanError(_not_allowed(str(ref), hint, pointer))


def output_problems(output: str | None, access: S3Access) -> list[Problem]:
    """Why a job's files may not be copied there. S3 itself is not asked: the worker finds out before it
    compresses."""
    if output is None or access.may_write(output):
        return []
    hint = "The operator names the places: bitmill project set NAME --output-prefix s3://bucket/folder."
    return [Problem("output_not_allowed", f"The project may not write to {output!r}.", hint, "/output")]


def _dataset_on_hub(dataset: DatasetSpec, hub: HubEnvironment) -> DatasetSpec:
    assert dataset.hub is not None
    ref = HubDataset.of(dataset).ref
    try:
        if hub.offline:
            commit = cached_commit("dataset", ref, hub)
        else:
            with HubClient(hub) as client:
                commit = client.commit("dataset", ref).ref.revision
    except SourceError as error:
        raise _refusal(error, "/dataset") from error
    return dataset.model_copy(update={"hub": f"{dataset.hub.partition('@')[0]}@{commit}"})


def _refusal(error: SourceError, pointer: str) -> PlanError | Unavailable:
    """The error of a submission that names what the Hub or S3 does not give."""
    if error.code in _UNREACHABLE:
        headers = {"Retry-After": str(_RETRY_SECONDS)}
        return Unavailable(error.code, error.message, error.hint, headers=headers)
    return PlanError(Problem(error.code, error.message, error.hint, pointer))


def check_links(folder: Path, allowed: LocalFolders) -> None:
    """Refuse a folder in which a link leads to what may not be read.

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
            if path.is_symlink() and not allowed.have(os.path.realpath(path)):
                hint = "Copy the file into the folder, or link to one below a root."
                raise PlanError(_not_allowed(str(path), hint, "/model"))


def _resolve(path: str, folders: LocalFolders, pointer: str) -> Path:
    hint = (
        "The server reads only below the folders of its setting BITMILL_LOCAL_ROOTS, and not its own files."
    )
    if "\0" in path:
        raise PlanError(_not_allowed(path, hint, pointer))
    real = os.path.realpath(path)
    if not folders.have(real):
        raise PlanError(_not_allowed(path, hint, pointer))
    return Path(real)


def _not_allowed(path: str, hint: str, pointer: str) -> Problem:
    return Problem("path_not_allowed", f"The server may not read {path!r}.", hint, pointer)


def _not_a_path(model: str, pointer: str) -> Problem:
    if _NAME.fullmatch(model):
        hint = "Names on the Hub have an owner, as in owner/name; folders are named by their absolute path."
        return Problem("model_not_found", f"There is no model {model!r} on this server.", hint, pointer)
    return _not_allowed(model, "Give the absolute path of a folder below a local root.", pointer)
