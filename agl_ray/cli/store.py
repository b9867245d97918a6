"""`agl-ray store VERB`: what a run's store holds, taken out, put back, cleared, served."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Look into a run's store, export it, import it, clear it, serve it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _store() -> None:
    """Look into a run's store, export it, import it, clear it, serve it."""


@app.command()
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="The journal: sqlite:///path, ...")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: a free one.")] = 4747,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="AGL_STORE_API_KEY", help="What callers must show."),
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Without a key, let other machines in.")
    ] = False,
    cache_mib: Annotated[
        float, typer.Option("--cache-mib", help="Newest span payloads kept in memory.")
    ] = 256.0,
) -> None:
    """Serve a store over HTTP, outside any run: our own calls, REST, OpenTelemetry.

    \b
    Example:
      agl-ray store serve sqlite:///store.db --port 4747
    """
    from agl_ray.cli.store_serve import serve as run

    run(url, host=host, port=port, api_key=api_key, open=open_, cache_mib=cache_mib)
