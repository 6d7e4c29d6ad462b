"""Published files of a job: which there are, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from api.artifacts.schemas import ArtifactList, ArtifactRead, Manifest, ManifestFile
from api.database import Database
from api.errors import NotFound
from api.jobs.ledger.models import Job
from api.jobs.service import get_job
from api.store.base import ObjectNotFound, Store


@dataclass(frozen=True)
class StoredArtifact:
    """A file and its key in the store."""

    file: ManifestFile
    key: str


def list_artifacts(database: Database, store: Store, project_id: str, job_id: str) -> ArtifactList:
    """A job's files, with their URLs.

    Raises:
        NotFound: `job_not_found`, `artifacts_not_available`, `artifacts_gone`.
    """
    job, manifest, folder = _manifest(database, store, project_id, job_id)
    files = [
        ArtifactRead(**file.model_dump(), url=f"/v1/jobs/{job_id}/artifacts/{quote(file.name)}")
        for file in manifest.files
    ]
    copied = job.output and f"{job.output}/{folder.removeprefix('artifacts/')}"
    return ArtifactList(job=job_id, output=copied, files=files)


def find_artifact(
    database: Database, store: Store, project_id: str, job_id: str, name: str
) -> StoredArtifact:
    """One file of a job; only names that the manifest has.

    Raises:
        NotFound: `artifact_not_found`, and what `list_artifacts` raises.
    """
    _, manifest, folder = _manifest(database, store, project_id, job_id)
    for file in manifest.files:
        if file.name == name:
            return StoredArtifact(file, f"{folder}/{name}")
    raise NotFound("artifact_not_found", f"The job has no file {name!r}.")


def _manifest(database: Database, store: Store, project_id: str, job_id: str) -> tuple[Job, Manifest, str]:
    """The job, the manifest that its row names, and the folder it lies in. The store is asked when the
    transaction is over."""
    with database.read() as session:
        job = get_job(session, project_id, job_id)
    if job.manifest_key is None:
        message = f"The job is {job.status.value} and has published no files."
        raise NotFound("artifacts_not_available", message, "A job has its files when it succeeded.")
    try:
        with store.open(job.manifest_key) as file:
            manifest = Manifest.model_validate_json(file.read())
    except ObjectNotFound as error:
        hint = 'Make them again: clone the job with {"cache": "bypass"}.'
        raise NotFound("artifacts_gone", "The job's files are no longer in the store.", hint) from error
    return job, manifest, job.manifest_key.rpartition("/")[0]
