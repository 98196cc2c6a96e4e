"""The command line, `kalamdb`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalamdb.config import Settings
from kalamdb.errors import KalamDbError
from kalamdb.server.serving import leave
from kalamdb.server.serving import serve as serve_database

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # A trace that shows values would show passwords.
    pretty_exceptions_enable=False,
    help="KalamDB: a database in a directory.",
)


@app.callback()
def _main() -> None:
    """KalamDB: a database in a directory."""


@app.command()
def serve(
    data_dir: Annotated[Path | None, typer.Option(help="directory of the database")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on; 0 takes a free one", min=0, max=65535)] = None,
    config: Annotated[Path | None, typer.Option(help="settings file, TOML")] = None,
) -> None:
    """Serve a database over HTTP and WebSocket until SIGTERM. What is not given here is taken from the settings."""
    try:
        settings = Settings.load(file=config)
        status = serve_database(
            Path(settings["storage.data_path"]) if data_dir is None else data_dir,
            settings,
            host=settings["server.host"] if host is None else host,
            port=settings["server.port"] if port is None else port,
        )
    except (KalamDbError, OSError) as exc:
        typer.echo(f"kalamdb serve: {exc}", err=True)
        status = 1
    leave(status)
    raise typer.Exit(status)
