"""`bitmill db`: the schema of the service's database."""

from __future__ import annotations

import typer

from cli.exits import Exit
from cli.folders import make_data_dir
from cli.output import JsonOption, err, fail, load_settings, out, print_json

app = typer.Typer(help="The service's database.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """The service's database."""


@app.command()
def upgrade(as_json: JsonOption = False) -> None:
    """Bring the schema to what this version needs. An embedded server does this by itself."""
    settings = load_settings(as_json=as_json)
    make_data_dir(settings, as_json=as_json, to_write=False)
    from sqlalchemy.exc import SQLAlchemyError

    import migrations
    from api.data_dir import secure_data_dir

    warning = secure_data_dir(settings).warning
    if warning is not None:
        err().print(warning, markup=False)
    try:
        migrations.upgrade(settings.database_url)
    except migrations.SchemaNewer as error:
        fail(Exit.FAILED, "schema_newer", str(error), as_json=as_json)
    except (SQLAlchemyError, OSError) as error:
        message = str(error).splitlines()[0]
        fail(Exit.FAILED, "database_failed", message, as_json=as_json, hint="Look at BITMILL_DATABASE_URL.")
    if as_json:
        print_json({"revision": migrations.head()})
    else:
        out().print(f"The database is at schema {migrations.head()}.")
