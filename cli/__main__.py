"""python -m cli: the same as the console script `bitmill`."""

from cli.main import app

app(prog_name="bitmill")
