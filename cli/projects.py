"""`bitmill project` and `bitmill key`: for the operator, on the service's database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.exits import Exit
from cli.output import JsonOption, fail, load_settings, out, print_json, print_table

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from api.projects.schemas import KeyCreated, KeyRead, ProjectRead
    from api.settings import Settings

NONE = "none"

projects = typer.Typer(
    help="Projects: who shares the service, and how much each may use.", no_args_is_help=True
)
keys = typer.Typer(help="API keys of any project.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The project's name.")]
LimitOption = Annotated[
    str | None, typer.Option(metavar="N|none", help="none: what the server's settings say.")
]


@projects.command("create")
def create_project(name: NameArgument, as_json: JsonOption = False) -> None:
    """Make a project and its first API key, with the scope admin. The key is shown this once."""
    with _database(as_json=as_json) as (session, settings):
        from api.jobs.queue import quotas
        from api.projects import service
        from api.projects.schemas import ProjectCreate
        from api.security import KeyHasher

        asked = ProjectCreate(name=name)
        row, key = service.create_project(session, KeyHasher.from_settings(settings), asked)
        project = service.describe(row, settings, quotas.use(session, row.id))
    if as_json:
        print_json({"project": project.model_dump(mode="json"), "key": key.model_dump(mode="json")})
    else:
        out().print(f"The project {name} is made.", markup=False)
        _print_key(key)


@projects.command("list")
def list_projects(as_json: JsonOption = False) -> None:
    """List projects with what they use and their limits."""
    with _database(as_json=as_json) as (session, settings):
        from api.jobs.queue import quotas
        from api.projects import repository, service

        found = [
            service.describe(row, settings, quotas.use(session, row.id))
            for row in repository.list_projects(session)
        ]
    if as_json:
        print_json({"projects": [project.model_dump(mode="json") for project in found]})
    else:
        _print_table(found)


@projects.command("set")
def update(
    name: NameArgument,
    max_queued: LimitOption = None,
    max_running: LimitOption = None,
    max_body_bytes: LimitOption = None,
    requests_per_minute: LimitOption = None,
    s3_prefix: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX|none", help="Where jobs may name text: s3://bucket/folder. Repeatable."),
    ] = None,
    output_prefix: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX|none", help="Where jobs may have files copied to. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set limits and prefixes of a project; those that are not given stay. They hold at once."""
    given = {
        "max_queued": max_queued,
        "max_running": max_running,
        "max_body_bytes": max_body_bytes,
        "requests_per_minute": requests_per_minute,
        "s3_prefixes": s3_prefix,
        "output_prefixes": output_prefix,
    }
    with _database(as_json=as_json) as (session, settings):
        from api.jobs.queue import quotas
        from api.projects import service
        from api.projects.schemas import ProjectUpdate

        asked = {
            field: None if value in (NONE, [NONE]) else value
            for field, value in given.items()
            if value is not None
        }
        row = service.update(session, name, ProjectUpdate.model_validate(asked))
        project = service.describe(row, settings, quotas.use(session, row.id))
    if as_json:
        print_json(project.model_dump(mode="json"))
    else:
        _print_table([project])


@keys.command("create")
def create_key(
    project: Annotated[str, typer.Option(metavar="NAME", help="The project that the key is for.")],
    scope: Annotated[
        list[str], typer.Option(help="read, submit (and read) or admin (everything); can be repeated.")
    ],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "unnamed",
    as_json: JsonOption = False,
) -> None:
    """Make an API key for a project. It is shown this once."""
    with _database(as_json=as_json) as (session, settings):
        from api.projects import service
        from api.projects.schemas import KeyCreate
        from api.security import KeyHasher

        asked = KeyCreate.model_validate({"name": name, "scopes": scope})
        owner = service.find_project(session, project)
        key = service.create_key(session, KeyHasher.from_settings(settings), owner.id, asked)
    if as_json:
        print_json(key.model_dump(mode="json"))
    else:
        _print_key(key)


@keys.command("list")
def list_keys(
    project: Annotated[str, typer.Option(metavar="NAME", help="The project whose keys to list.")],
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List a project's API keys, the newest first. The keys themselves are kept nowhere."""
    with _database(as_json=as_json) as (session, _settings):
        from api.projects import service

        owner = service.find_project(session, project)
        found = service.list_keys(session, owner.id, None, limit).items
    if as_json:
        print_json({"keys": [key.model_dump(mode="json") for key in found]})
    else:
        print_table(("key", "scopes", "state", "last used", "name"), map(_key_row, found))


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, which begins with key_.")],
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key: from then on it is refused."""
    with _database(as_json=as_json) as (session, _settings):
        from api.projects import service

        key = service.revoke_key(session, key_id)
    if as_json:
        print_json(key.model_dump(mode="json"))
    else:
        out().print(f"{key_id} is revoked.", markup=False)


@contextmanager
def _database(*, as_json: bool) -> Iterator[tuple[Session, Settings]]:
    """A transaction on the configured database. What goes wrong in it ends the command with an exit code."""
    settings = load_settings(as_json=as_json)
    from pydantic import ValidationError
    from sqlalchemy.exc import SQLAlchemyError

    from api.database import Database
    from api.errors import ApiError

    try:
        with closing(Database(settings.database_url)) as database, database.write() as session:
            yield session, settings
    except ValidationError as error:
        first = error.errors()[0]
        fail(Exit.USAGE, "bad_option", f"{first['loc'][0]}: {first['msg']}", as_json=as_json)
    except ApiError as error:
        fail(Exit.REFUSED, error.code, error.message, as_json=as_json, hint=error.hint)
    except SQLAlchemyError as error:
        message, hint = str(error).splitlines()[0], "Look at BITMILL_DATABASE_URL, or run: bitmill db upgrade"
        fail(Exit.FAILED, "database_failed", message, as_json=as_json, hint=hint)


def _print_key(key: KeyCreated) -> None:
    out().print(f"The API key {key.id}, shown this once: [bold]{key.key}[/]")


def _key_row(key: KeyRead) -> tuple[str, ...]:
    if key.revoked_at is not None:
        state = "revoked"
    else:
        state = f"until {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "good"
    used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
    return key.id, ", ".join(key.scopes), state, used, key.name


def _print_table(found: Sequence[ProjectRead]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("project", "queued", "running", "largest body", "requests a minute"):
        table.add_column(heading, no_wrap=True)
    for heading in ("reads", "writes"):
        table.add_column(heading, overflow="fold")
    for project in found:
        use, limits = project.use, project.limits
        table.add_row(
            project.name,
            f"{use.queued} of {_shown(limits.max_queued)}",
            f"{use.running} of {_shown(limits.max_running)}",
            str(limits.max_body_bytes),
            _shown(limits.requests_per_minute),
            "\n".join(project.s3_prefixes),
            "\n".join(project.output_prefixes),
        )
    out().print(table)


def _shown(limit: int | None) -> str:
    return "any" if limit is None else str(limit)
