"""`bitmill download`: a job's checkpoint, every file checked against its digest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.exits import Exit
from cli.formats import bytes_text
from cli.output import JsonOption, err, fail, out, print_json

if TYPE_CHECKING:
    from api.client import Client
    from api.client.types import ArtifactRead


def download(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the files; made unless it exists.")],
    as_json: JsonOption = False,
) -> None:
    """Download a job's checkpoint.

    Files that are there and whole are kept, so an interrupted download goes on.
    """
    from api.client import DigestMismatch
    from cli.connection import server

    try:
        with server(as_json=as_json) as client:
            files = fetch(client, job_id, output_dir)
    except DigestMismatch as error:
        hint = "Try again; if it stays so, the server's store is damaged."
        fail(Exit.FAILED, "digest_mismatch", str(error), as_json=as_json, hint=hint)
    except OSError as error:
        fail(Exit.FAILED, "cannot_write", f"{output_dir}: {error}", as_json=as_json)
    if as_json:
        print_json({"folder": str(output_dir.absolute()), "files": files})
    else:
        out().print(f"{len(files)} files in {output_dir}", markup=False)


def fetch(client: Client, job_id: str, folder: Path) -> list[ArtifactRead]:
    """Download every file of the manifest and return its entries {name, size, sha256, url}.

    Raises:
        DigestMismatch: a file arrived otherwise than it was written.
        OSError: the folder cannot be written to.
    """
    files = client.artifacts(job_id)["files"]
    with err().status("") as status:
        for file in files:
            status.update(f"{file['name']}, {bytes_text(file['size'])}")
            target = _inside(folder, file["name"])
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download(job_id, file["name"], target)
    return files


def _inside(folder: Path, name: str) -> Path:
    """The file of that relative name; a server cannot make the client write elsewhere."""
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{name!r} leads out of the folder")
    return target
