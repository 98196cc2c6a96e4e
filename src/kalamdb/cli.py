"""The command line, `kalamdb`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalamdb.config import Settings
from kalamdb.server.serving import serve as serve_database

app = typer.Typer(no_args_is_help=True, add_completion=False, help="KalamDB: a database in a directory.")


@app.callback()
def _main() -> None:
    """KalamDB: a database in a directory."""


@app.command()
def serve(
    data_dir: Annotated[Path, typer.Option(help="directory of the database")] = Path("data"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8080,
    config: Annotated[Path | None, typer.Option(help="settings file, TOML")] = None,
) -> None:
    """Serve a database over HTTP and WebSocket until SIGTERM."""
    raise typer.Exit(serve_database(data_dir, Settings.load(file=config), host=host, port=port))
