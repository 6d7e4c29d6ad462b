"""What the routes of projects and keys take and answer."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from api.security import Scope
from api.settings import check_s3_prefix

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]


S3Prefix = Annotated[str, Field(max_length=800), AfterValidator(check_s3_prefix)]
_Limit = Annotated[int, Field(ge=0, le=2**31 - 1)]
_SomeLimit = Annotated[int, Field(ge=1, le=2**31 - 1)]


class ProjectCreate(BaseModel):
    """A project to make."""

    name: Name


class ProjectUpdate(BaseModel):
    """What to set of a project; what is not given stays, and null is what the server's settings say."""

    max_queued: _Limit | None = None
    max_running: _Limit | None = None
    max_body_bytes: _SomeLimit | None = None
    requests_per_minute: _SomeLimit | None = None
    s3_prefixes: list[S3Prefix] | None = None
    output_prefixes: list[S3Prefix] | None = None


class LimitsRead(BaseModel):
    """What the project may use, by its own limits and the server's; null: no limit."""

    model_config = ConfigDict(from_attributes=True)

    max_queued: int | None = Field(description="Jobs that wait at once.")
    max_running: int | None = Field(description="Jobs that run at once.")
    max_body_bytes: int = Field(description="Of a request.")
    requests_per_minute: int | None


class ProjectUse(BaseModel):
    """What of it is used."""

    queued: int
    running: int


class ProjectRead(BaseModel):
    """The project that a key belongs to."""

    id: str = Field(examples=["proj_3f9c0a5be1d27c4486aa"])
    name: str
    created_at: datetime
    limits: LimitsRead
    s3_prefixes: list[str] = Field(description="Where in S3 its jobs may name models and text.")
    output_prefixes: list[str] = Field(description="Where in S3 its jobs may have their files copied to.")
    use: ProjectUse


class KeyCreate(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(examples=["nightly builds"])
    scopes: list[Scope] = Field(
        min_length=1,
        max_length=len(Scope),
        description="submit may also read; admin may everything, keys included.",
    )
    expires_at: AwareDatetime | None = Field(default=None, description="From then on the key is refused.")


class KeyRead(BaseModel):
    """A key, without what it is used by. `last_used_at` is up to an hour late."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["key_0b6e2f4d9a8c1735ee41"])
    name: str
    scopes: list[Scope]
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None


class KeyCreated(KeyRead):
    """A new key, this once with the key itself."""

    key: str


class KeyPage(BaseModel):
    """Keys, the newest first, those that are revoked among them. `next_cursor` is null on the last page."""

    items: list[KeyRead]
    next_cursor: str | None
