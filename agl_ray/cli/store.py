"""`agl-ray store VERB`: what a run's store holds, taken out, put back, cleared, served.

RUN is a run folder, a run's name, `latest`, a store.db, or a URL (`sqlite:///path`, `postgresql://...`, `mongodb://...`). Reading verbs look
at a living run's SQLite file or PostgreSQL database beside its owner, or ask the door of a running store (`http://host:port`). Test alone: tests/unit/test_cli_store.py.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agl_ray.cli.verbs import Verbs
from agl_ray.types import MODES

if TYPE_CHECKING:
    from agl_ray.cli.store_target import Target

app = typer.Typer(
    cls=Verbs,
    help="Look into a run's store, export it, import it, clear it, serve it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RUN = "A run folder, a run's name, `latest`, a store.db, or a URL."
Run = Annotated[str, typer.Argument(metavar="RUN", help=RUN)]
RunId = Annotated[
    str | None, typer.Option("--run-id", help="Of a URL that several runs share: whose records.")
]
Payload = Annotated[
    str | None, typer.Option("--payload", metavar="URI", help="Of a URL: where span payloads are.")
]
Encryption = Annotated[
    str | None,
    typer.Option("--encryption", help="Of a URL: aes-gcm or fernet; keys in AGL_ENCRYPTION_KEYS."),
]
READ = (
    RUN[:-1] + "; or the door of a running store (http://host:port, its key in AGL_STORE_API_KEY)."
)
ReadRun = Annotated[str, typer.Argument(metavar="RUN", help=READ)]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.callback()
def _store() -> None:
    """Look into a run's store, export it, import it, clear it, serve it."""


def _target(run: str, run_id: str | None, payload: str | None, encryption: str | None) -> Target:
    from agl_ray.cli.store_target import target_of

    return target_of(run, run_id=run_id, payload=payload, encryption=encryption)


@app.command()
def ls(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help=READ + " None: all runs.")
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option("--status", help="Only these, such as failed; may be repeated."),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="Only train, val or test.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Rollouts at most; 0: all.")] = 20,
    oldest: Annotated[bool, typer.Option("--oldest", help="The oldest ones first.")] = False,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are.")] = Path("runs"),
    as_json: Json = False,
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """List runs, or the rollouts of a run (the newest first).

    \b
    Examples:
      agl-ray store ls
      agl-ray store ls latest --status failed --limit 50
      agl-ray store ls runs/latest --mode val --limit 0 --json
    """
    from agl_ray.cli.store_look import list_rollouts, list_runs
    from agl_ray.types import RolloutStatus

    known = [one.value for one in RolloutStatus]
    for one in status or ():
        if one not in known:
            raise typer.BadParameter(f"expected one of {known}, got {one!r}", param_hint="--status")
    if mode not in (None, *MODES):
        raise typer.BadParameter(f"expected one of {MODES}, got {mode!r}", param_hint="--mode")
    if run is None:
        if status or mode:
            raise typer.BadParameter("--status and --mode need a RUN", param_hint="RUN")
        asyncio.run(list_runs(runs_dir, as_json))
        return
    listing = list_rollouts(
        _target(run, run_id, payload, encryption),
        status=status,
        mode=mode,
        most=limit or None,
        oldest_first=oldest,
        as_json=as_json,
    )
    asyncio.run(listing)


@app.command()
def show(
    rollout: Annotated[
        str, typer.Argument(metavar="ROLLOUT", help="Its id, or the beginning of it.")
    ],
    run: Annotated[str, typer.Option("--run", metavar="RUN", help=READ)] = "latest",
    as_json: Json = False,
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Show one rollout: attempts, spans as a tree, rewards, errors.

    \b
    Example:
      agl-ray store show ro-3f2a90c1b2d4 --run runs/latest
    """
    from agl_ray.cli.store_look import show_rollout

    asyncio.run(show_rollout(_target(run, run_id, payload, encryption), rollout, as_json))


@app.command()
def export(
    run: ReadRun,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Write a store as Parquet: rollouts, attempts, spans, resources, workers, state.

    A living run is exported as it is at this moment (through a door: page by page, while it goes on). An encrypted store comes out in plain
    text.

    \b
    Examples:
      agl-ray store export latest --out exported
      duckdb -c "SELECT end_reason, avg(reward) FROM 'exported/attempts.parquet' GROUP BY ALL"
    """
    from agl_ray.cli.store_target import opened
    from agl_ray.store.export import export_store

    target = _target(run, run_id, payload, encryption)

    async def work() -> dict[str, int]:
        async with opened(target) as archive:
            return await export_store(archive, out, target.shown)

    for name, number in asyncio.run(work()).items():
        print(f"{name:<10} {number:>12,}  {out / name}.parquet")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `store export` wrote.")],
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="A journal that holds nothing yet: sqlite:///path, ..."),
    ],
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Put an export into an empty store: the same ids, order, spans.

    \b
    Example:
      agl-ray store import exported sqlite:///store.db
    """
    from agl_ray.cli.store_target import Target, settings_of
    from agl_ray.store.importing import import_store
    from agl_ray.types import InputError

    if "://" not in url:
        raise InputError(f"store import: expected a URL such as sqlite:///store.db, got {url!r}")
    target = Target(url, settings_of(run_id=run_id, payload=payload, encryption=encryption))
    for name, number in asyncio.run(import_store(folder, url, target.settings)).items():
        print(f"{name:<10} {number:>12,}")
    print(f"imported into {target.shown}")


@app.command()
def gc(
    run: Run,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="WHEN", help="Begun before: 7d, or a date."),
    ] = None,
    finished_before: Annotated[
        str | None, typer.Option("--finished-before", metavar="WHEN", help="Ended before that.")
    ] = None,
    keep_steps: Annotated[
        int | None,
        typer.Option(
            "--keep-steps", min=0, help="Of training steps, drop all but the last so many."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum/--no-vacuum", help="Make a SQLite file smaller afterwards.")
    ] = True,
    as_json: Json = False,
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Drop finished rollouts, with their attempts and spans. All rules that are given must hold.

    \b
    Examples:
      agl-ray store gc latest --keep-steps 10 --dry-run
      agl-ray store gc runs/old --finished-before 7d
    """
    from agl_ray.cli.store_clear import Rule, clear, moment_of

    rule = Rule(
        None if older_than is None else moment_of("--older-than", older_than),
        None if finished_before is None else moment_of("--finished-before", finished_before),
        keep_steps,
    )
    done = asyncio.run(clear(_target(run, run_id, payload, encryption), rule, dry_run, vacuum))
    if as_json:
        print(json.dumps(done._asdict() | {"dry_run": dry_run}))
        return
    verb = "would drop" if dry_run else "dropped"
    mib = done.span_bytes / 2**20
    print(
        f"{verb} {done.rollouts:,} rollouts with {done.spans:,} spans ({mib:,.1f} MiB of payloads)"
    )
    if done.file_before is not None and done.file_after is not None and not dry_run:
        before, after = (size / 2**20 for size in (done.file_before, done.file_after))
        print(f"file: {before:,.1f} MiB -> {after:,.1f} MiB")


@app.command()
def rotate(
    run: Run,
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Seal an encrypted store with the newest of AGL_ENCRYPTION_KEYS; the older keys are not needed afterwards.

    Values rest under data keys of the store's own; those are what AGL_ENCRYPTION_KEYS seals, and what is sealed anew.

    \b
    Example:
      AGL_ENCRYPTION_KEYS=NEW,OLD agl-ray store rotate latest
    """
    from agl_ray.cli.store_rotate import rotate as work

    target = _target(run, run_id, payload, encryption)
    asyncio.run(work(target))
    print(f"{target.shown}: the newest key opens it, and no other one")


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
    run_id: RunId = None,
    payload: Payload = None,
    encryption: Encryption = None,
) -> None:
    """Serve a store over HTTP, outside any run: our own calls, REST, OpenTelemetry.

    \b
    Example:
      agl-ray store serve sqlite:///store.db --port 4747
    """
    from agl_ray.cli.store_serve import serve as run
    from agl_ray.cli.store_target import settings_of

    run(
        url,
        host=host,
        port=port,
        api_key=api_key,
        open=open_,
        cache_mib=cache_mib,
        settings=settings_of(run_id=run_id, payload=payload, encryption=encryption),
    )
