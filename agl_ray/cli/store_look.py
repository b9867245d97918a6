"""`agl-ray store ls` and `show`: runs, rollouts, and one rollout with its attempts and spans.

Called by `agl_ray.cli.store`. Test alone: tests/unit/test_cli_store.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from agl_ray.cli.store_target import Target, opened, target_of
from agl_ray.ops.run_folder import CONFIG
from agl_ray.ops.summary_text import message_line
from agl_ray.spans import KIND_CALL
from agl_ray.store.archive import Archive
from agl_ray.store.payload import rows_of
from agl_ray.types import Attempt, InputError, Rollout, to_json

PIPE = 400  # characters of a line where no terminal has a width
ROOM = 100  # columns of a terminal with room for inputs beside their rollouts
WORDS = 200  # characters of a message under its call
WIDE = 40  # characters of an input or an error in a table
ID_CHARACTERS = 5  # of an id before it may be cut short: `ro-` and two more
Row = dict[str, Any]


async def list_runs(runs_dir: Path, as_json: bool) -> None:
    """The runs of `runs_dir`, newest last."""
    folders = _folders(runs_dir)
    if not folders and not as_json:
        raise InputError(f"there are no runs in {runs_dir}; name a run folder, a store.db or a URL")
    rows = [await _run(folder, changed) for changed, folder in folders]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = _table("run", "rollouts", "ok", "other ends", "spans", "MiB", "last change", "state")
    for row in rows:
        values = [row[name] for name in ("run", "rollouts", "ok", "other_ends", "spans")]
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f}"
        table.add_row(*map(_text, [*values, size, _when(row["last_change"]), row["state"]]))
    _console().print(table)


def _folders(runs_dir: Path) -> list[tuple[float, Path]]:
    """(last change, run folder), oldest first."""
    found = [one.parent for one in runs_dir.glob(f"*/{CONFIG}")]
    return sorted((one.stat().st_mtime, one) for one in found if not one.is_symlink())


async def _run(folder: Path, changed: float) -> Row:
    row: Row = dict.fromkeys(("rollouts", "ok", "other_ends", "spans", "bytes"))
    row = {"run": folder.name, **row, "last_change": changed, "state": ""}
    try:
        target = target_of(str(folder))
        if target.file is None:
            return row | {"state": target.shown}
        size, changed = _size(target.file)
        async with opened(target) as archive:
            counts = _counts(archive)
            state = "alive" if archive.alive else ""
        return row | counts | {"bytes": size, "last_change": changed, "state": state}
    except InputError as error:
        return row | {"state": str(error)}


def _counts(archive: Archive) -> Row:
    live = archive.live
    ends = {name: number for name, number in live.attempts_by_reason.items() if name}
    ok = ends.pop("ok", 0)
    rollouts = sum(live.rollouts_by_status.values())
    return {
        "rollouts": rollouts,
        "ok": ok,
        "other_ends": sum(ends.values()),
        "spans": live.num_spans,
    }


async def list_rollouts(
    target: Target,
    *,
    status: Sequence[str] | None,
    mode: str | None,
    most: int | None,
    oldest_first: bool,
    as_json: bool,
) -> None:
    """Rollouts with their latest attempt, one a line."""
    rows: list[Row] = []
    async with opened(target) as archive:
        pages = archive.rollouts(
            status_in=status, mode=mode, newest_first=not oldest_first, most=most
        )
        async for page in pages:
            ids = [one.rollout.rollout_id for one in page]
            latest = {one.rollout_id: one for one in await archive.attempts(ids)}
            rows += [_row(one.rollout, latest.get(one.rollout.rollout_id)) for one in page]
        head = _head(target, archive)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = _console()
    room = ("input",) if console.width >= ROOM else ()  # `show` has it too
    columns = ("rollout", "status", "mode", "tries", "end", "reward", "spans", "sec", "started")
    table = _table(*columns, *room)
    for row in rows:
        attempt = row["latest_attempt"] or {}
        values = [row["rollout_id"], row["status"], row["mode"], row["num_attempts"]]
        values += [attempt.get("end_reason"), attempt.get("reward"), attempt.get("num_spans")]
        values += [_seconds(row), _when(row["start_time"]), _short(json.dumps(row["input"]))]
        table.add_row(*map(_text, values[: len(columns) + len(room)]))
    console.print(Text(head))
    console.print(table)


def _head(target: Target, archive: Archive) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in sorted(archive.live.rollouts_by_status.items()))
    alive = " (its run is alive; this is how it was a moment ago)" if archive.alive else ""
    return f"{target.shown}{alive}: {counts or 'no rollouts'}"


def _row(rollout: Rollout, attempt: Attempt | None) -> Row:
    row: Row = json.loads(to_json(rollout))
    return row | {"latest_attempt": None if attempt is None else json.loads(to_json(attempt))}


async def show_rollout(target: Target, rollout_id: str, as_json: bool) -> None:
    """One rollout: its attempts, and the spans of each as a tree."""
    async with opened(target) as archive:
        rollout = await _find(archive, rollout_id, target)
        ids = [rollout.rollout_id]
        attempts = await archive.attempts(ids)
        spans: list[Row] = []
        async for table in archive.spans(await archive.span_totals(ids)):
            spans += rows_of(table)
    of = {
        one.attempt_id: [row for row in spans if row["attempt_id"] == one.attempt_id]
        for one in attempts
    }
    if as_json:
        shown = json.loads(to_json(rollout))
        shown["attempts"] = [
            json.loads(to_json(one)) | {"spans": of[one.attempt_id]} for one in attempts
        ]
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return
    console = _console()
    console.print(_tree(rollout, attempts, of))


async def _find(archive: Archive, rollout_id: str, target: Target) -> Rollout:
    found = await archive.rollout(rollout_id)
    if found is not None:
        return found
    alike = await archive.ids_like(rollout_id) if len(rollout_id) >= ID_CHARACTERS else []
    if len(alike) == 1:
        found = await archive.rollout(alike[0])
        assert found is not None
        return found
    hint = f"; these start so: {', '.join(alike[:5])}" if alike else ""
    raise InputError(f"there is no rollout {rollout_id!r} in {target.shown}{hint}")


def _tree(rollout: Rollout, attempts: Sequence[Attempt], spans: dict[str, list[Row]]) -> Tree:
    place = ", ".join(f"{key} {value}" for key, value in rollout.metadata.items())
    head = Text(f"{rollout.rollout_id}  {rollout.status.value}", style="bold")
    head.append(f"  {rollout.mode or ''}  started {_when(rollout.start_time)}  {place}", "not bold")
    tree = Tree(head)
    tree.add(Text(f"input: {_short(json.dumps(rollout.input), 400)}"))
    tree.add(Text(f"resources: {rollout.resources_id}"))
    for one in attempts:
        end = one.end_reason.value if one.end_reason else one.status.value
        reward = "" if one.reward is None else f"  reward {one.reward:g}"
        line = f"attempt {one.sequence_id}  {one.attempt_id}  {end}{reward}  {_seconds(json.loads(to_json(one)))} s"
        branch = tree.add(Text(f"{line}  by {one.worker_id}  {one.num_spans} spans"))
        if one.error:
            branch.add(Text(f"error: {one.error}", style="red"))
        _add_spans(branch, spans[one.attempt_id])
    return tree


def _add_spans(branch: Tree, rows: Sequence[Row]) -> None:
    """Each under its parent; those whose parent is elsewhere under the attempt."""
    ordered = sorted(rows, key=lambda row: row["sequence_id"])
    parents: dict[str | None, list[Row]] = {}
    known = {row["span_id"] for row in ordered}
    for row in ordered:
        parent = row["parent_id"] if row["parent_id"] in known - {row["span_id"]} else None
        parents.setdefault(parent, []).append(row)
    waiting = [(branch, row) for row in reversed(parents.get(None, []))]
    shown = set()
    while waiting:
        place, row = waiting.pop()
        shown.add(row["span_id"])
        under = place.add(Text(_span_line(row), style="red" if row["status"] == "ERROR" else ""))
        for line in _said(row):
            under.add(Text(line, style="dim"))
        waiting += [(under, child) for child in reversed(parents.get(row["span_id"], []))]
    for row in ordered:  # parents in a circle
        if row["span_id"] not in shown:
            branch.add(Text(_span_line(row)))


def _span_line(row: Row) -> str:
    parts = [f"{row['sequence_id']}  {row['name']}"]
    parts.append(f"{(row['end_ns'] - row['start_ns']) / 1e6:.1f} ms")
    if row["kind"] == KIND_CALL:
        tokens = row["prompt_tokens"] or len(row["prompt_ids"] or ())
        answered = row["response_tokens"] or len(row["response_ids"] or ())
        versions = sorted({version for _, version in row["weight_versions"] or ()})
        weights = f", weights {', '.join(map(str, versions))}" if versions else ""
        parts.append(f"{tokens} + {answered} tokens, {row['finish_reason']}{weights}")
    if row["reward"] is not None:
        parts.append(f"reward {row['reward']:g} ({row['reward_dimension'] or 'primary'})")
    if row["role"]:
        parts.append(f"role {row['role']}")
    if row["status"] == "ERROR":
        parts.append(f"ERROR {row['status_message'] or ''}")
    return "  ".join(parts)


def _said(row: Row) -> list[str]:
    """What is new in the request of a call, and its answer, a line each."""
    attributes = row["attributes"] or {}
    request, answer = attributes.get("request"), attributes.get("response")
    # Spans from elsewhere may have attributes of these names that are something else.
    asked = request.get("messages") or [] if isinstance(request, dict) else []
    messages = [one for one in [*asked, answer] if isinstance(one, dict) and one.get("role")]
    return [_short(message_line(one), WORDS) for one in messages if one["role"] != "system"]


def _seconds(row: Row) -> str:
    end = row["end_time"]
    return "" if end is None else f"{end - row['start_time']:.1f}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _short(text: str, most: int = WIDE) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _table(name: str, *columns: str) -> Table:
    """Its first column holds names, to be copied: where room is short the others give way."""
    others = [Column(one, overflow="fold") for one in columns]
    narrow = (0, 1, 0, 0)
    return Table(Column(name, no_wrap=True), *others, box=box.SIMPLE_HEAD, padding=narrow)


def _console() -> Console:
    """A pipe or a file has no width: nothing is cut off there."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE)


def _text(value: Any) -> Text:
    """As it is: brackets in it are no markup."""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return Text("" if value is None else shown)


def _size(file: Path) -> tuple[int, float]:
    """(bytes, last change) of a SQLite file with its write-ahead log."""
    parts = [one for one in (file, file.with_name(file.name + "-wal")) if one.exists()]
    facts = [one.stat() for one in parts]
    return sum(one.st_size for one in facts), max((one.st_mtime for one in facts), default=0.0)
