"""What the artifacts routes answer."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ManifestFile(BaseModel):
    """A published file, as the manifest in the store has it."""

    name: str = Field(examples=["model-00001-of-00031.safetensors"])
    size: int = Field(description="Bytes.")
    sha256: str


class Manifest(BaseModel):
    """manifest.json of a job's artifacts: written last, so that what it names is there."""

    job: str
    files: list[ManifestFile]


class ArtifactRead(ManifestFile):
    """A published file and where to get it, relative to the server."""

    url: str


class ArtifactList(BaseModel):
    """All files of a job."""

    job: str
    output: str | None = Field(
        description="The folder in S3 that they were copied to.",
        examples=["s3://models/search/job_06dk2m8x0c4q7tz9h3v5n1w8er/1"],
    )
    files: list[ArtifactRead]
