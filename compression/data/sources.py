"""Where a job's model and text are: on this machine, or on the Hub or in S3, from where they are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from compression.boundary import last_resort
from compression.data.hub_rows import fetch_rows
from compression.events import FetchProgress, OnEvent, Teller
from compression.hub.client import HubClient
from compression.hub.environment import HubEnvironment
from compression.hub.headers import header_folder
from compression.hub.references import HubRef
from compression.hub.snapshots import fetch_model
from compression.recipe import Calibration, DatasetSpec, Evaluation
from compression.s3.client import S3Ref, fetch_object
from compression.s3.models import S3ModelRef, fetch_s3_model, s3_header_folder


@dataclass(frozen=True)
class Sources:
    """What a run works on. name: what the model is called. origins: where that is from which was fetched, by
    "model" and "dataset": {"hub", "revision"}, {"s3", "revision"} of a model, or {"s3", "etag", "version_id",
    "size"} of a dataset. pinned: the dataset as a later run has to ask for it to get the same; None where
    nothing has to be added."""

    folder: Path
    name: str
    dataset: DatasetSpec | None
    origins: dict[str, dict[str, Any]]
    pinned: DatasetSpec | None = None


def remote_model(source: str | Path) -> HubRef | S3ModelRef | None:
    """The model in S3 or on the Hub that a source names; None for a folder. A folder that exists comes before
    one on the Hub."""
    if isinstance(source, Path):
        return None
    if ref := S3ModelRef.parse(source):
        return ref
    try:
        is_folder = Path(source).is_dir()
    except OSError:  # of a name that no folder can have, say
        is_folder = False
    return None if is_folder else HubRef.parse(source)


def asks_s3(source: str | Path, dataset: DatasetSpec | None) -> bool:
    """Whether something of a job is in S3."""
    in_s3 = dataset is not None and dataset.s3 is not None
    return in_s3 or isinstance(remote_model(source), S3ModelRef)


def local(source: str | Path, dataset: DatasetSpec | None) -> Sources | None:
    """The sources of a job that has nothing to fetch, else None."""
    if remote_model(source) is not None or (dataset is not None and dataset.is_remote):
        return None
    return Sources(Path(source), Path(source).name, dataset, {})


def headers_of(source: str | Path) -> tuple[Path, str]:
    """A folder to plan from, the model's own or one with the headers of a model elsewhere; the model's name.

    Raises SourceError: what HubClient, `wanted_files` and `s3_header_folder` raise.
    """
    ref = remote_model(source)
    if ref is None:
        return Path(source), Path(source).name
    environment = HubEnvironment.read()
    if isinstance(ref, S3ModelRef):
        return s3_header_folder(ref, environment.home)[0], ref.name
    if environment.offline:
        return fetch_model(ref, environment, lambda _done, _total: None), ref.name
    with HubClient(environment) as client:
        return header_folder(client, client.commit("model", ref), environment), ref.name


@last_resort
def fetch(
    source: str | Path,
    dataset: DatasetSpec | None,
    calibration: Calibration,
    evaluation: Evaluation,
    on_event: OnEvent,
) -> Sources:
    """Have everything on this machine. `on_event` hears of it now and then; what it raises ends the fetching.

    Raises SourceError: what `fetch_model`, `fetch_s3_model`, `fetch_rows` and `fetch_object` raise.
    """
    environment = HubEnvironment.read()
    origins: dict[str, dict[str, Any]] = {}
    folder, name, pinned = Path(source), Path(source).name, None
    ref = remote_model(source)
    if isinstance(ref, HubRef):
        folder, name = fetch_model(ref, environment, _progress(on_event, "model", str(ref))), ref.name
        origins["model"] = {"hub": ref.id, "revision": folder.name}
    elif ref is not None:
        progress = _progress(on_event, "model", str(ref.folder))
        (folder, state), name = fetch_s3_model(ref, environment.home, progress), ref.name
        origins["model"] = {"s3": str(ref.folder), "revision": state.revision}
    if dataset is not None and dataset.hub is not None:
        progress = _progress(on_event, "dataset", dataset.hub)
        dataset, found = fetch_rows(dataset, calibration, evaluation, environment, progress)
        origins["dataset"] = {"hub": found.id, "revision": found.revision}
    elif dataset is not None and dataset.s3 is not None:
        dataset, pinned, origins["dataset"] = _from_s3(dataset, environment.home, on_event)
    return Sources(folder, name, dataset, origins, pinned)


def _from_s3(
    asked: DatasetSpec, home: Path, on_event: OnEvent
) -> tuple[DatasetSpec, DatasetSpec, dict[str, Any]]:
    """The dataset as a local file, pinned, and where it came from."""
    ref = S3Ref.parse(asked.s3 or "")
    assert ref is not None  # DatasetSpec has seen to that
    progress = _progress(on_event, "dataset", str(ref))
    path, found = fetch_object(ref, asked.etag, asked.version_id, home, progress)
    local_copy = DatasetSpec(
        path=str(path), text_column=asked.text_column, messages_column=asked.messages_column
    )
    pinned = asked.model_copy(update={"etag": found.etag, "version_id": found.version_id})
    return local_copy, pinned, found.to_dict()


def _progress(on_event: OnEvent, what: Literal["model", "dataset"], name: str) -> Teller:
    return Teller(on_event, partial(FetchProgress, what, name))
