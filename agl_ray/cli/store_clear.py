"""`agl-ray store gc`: finished rollouts that nobody needs any more are dropped with their attempts and spans.

What may go is chosen while reading; then the journal is owned for the dropping, so a living run is refused. A SQLite file is made
smaller afterwards. Called by `agl_ray.cli.store`. Test alone: tests/unit/test_cli_store.py.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from agl_ray.cli.store_target import Target, opened
from agl_ray.store.archive import Archive, JournalArchive
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.opening import open_journal
from agl_ray.types import InputError, Rollout, RolloutStatus, StoreError

FORGET = 500  # rollouts of one transaction
FINAL = [one.value for one in RolloutStatus if one.final]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Rule(NamedTuple):
    """All that is given must hold. Times are seconds since the epoch; keep_steps: of the last training steps."""

    started_before: float | None = None
    finished_before: float | None = None
    keep_steps: int | None = None


class Cleared(NamedTuple):
    rollouts: int
    spans: int
    span_bytes: int
    file_before: int | None  # bytes of the SQLite file
    file_after: int | None


def moment_of(option: str, text: str, now: float | None = None) -> float:
    """`7d`, `12h`, `30m` ago, or a date such as 2026-11-20 or 2026-11-20T12:00."""
    now = time.time() if now is None else now
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if ago:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise InputError(
            f"{option}: expected an age such as 7d or 12h, or a date such as 2026-11-20, got {text!r}"
        ) from error


async def clear(target: Target, rule: Rule, dry_run: bool, vacuum: bool) -> Cleared:
    """Drop the final rollouts that `rule` names; what was (or with `dry_run` would be) dropped."""
    if not any(value is not None for value in rule):
        raise InputError(
            "store gc: say what may go: --older-than, --finished-before, --keep-steps, or several of them"
        )
    if target.door:
        raise InputError(
            f"store gc {target.shown}: a store is cleared by its journal: name its run folder or URL"
        )
    before = _size(target.file)
    if dry_run:
        async with opened(target) as archive:
            found = [one async for one in _choose(archive, rule)]
        return _sum(found, before, before)
    if target.alive:
        raise InputError(
            f"{target.shown}: its run is alive and owns it; end the run first (--dry-run looks without owning)"
        )
    journal = open_journal(target.url, target.settings)
    try:
        live = await open_checked(journal, must_exist=True)
    except StoreError as error:
        raise InputError(str(error)) from error
    try:
        found = [one async for one in _choose(JournalArchive(journal, live), rule)]
        ids = [rollout_id for rollout_id, _, _ in found]
        for start in range(0, len(ids), FORGET):
            await journal.forget(ids[start : start + FORGET])
    finally:
        await journal.close()
    if vacuum and target.file is not None and found:
        shrink(target.file)
    return _sum(found, before, _size(target.file))


_Found = tuple[str, int, int]
"""rollout id, its spans, their bytes"""


async def _choose(archive: Archive, rule: Rule) -> AsyncIterator[_Found]:
    first_kept = await _first_kept_step(archive, rule.keep_steps)
    async for page in archive.rollouts(status_in=FINAL):
        ids = [one.rollout.rollout_id for one in page if _may_go(one.rollout, rule, first_kept)]
        if not ids:
            continue
        still_open = {one.rollout_id for one in await archive.attempts(ids) if not one.status.final}
        numbers = dict.fromkeys(ids, (0, 0))
        for total in await archive.span_totals(ids):
            number, size = numbers[total.key[0]]
            numbers[total.key[0]] = (number + total.number, size + total.size)
        for rollout_id, (number, size) in numbers.items():
            if rollout_id not in still_open:
                yield rollout_id, number, size


async def _first_kept_step(archive: Archive, keep: int | None) -> int | None:
    """The first of the last `keep` steps that rollouts belong to."""
    if keep is None:
        return None
    last = -1
    async for page in archive.rollouts():
        last = max([last, *(step for one in page if (step := _step(one.rollout)) is not None)])
    return last - keep + 1


def _may_go(rollout: Rollout, rule: Rule, first_kept: int | None) -> bool:
    """A rollout that belongs to no step is not dropped by --keep-steps."""
    ended = rollout.end_time if rollout.end_time is not None else rollout.start_time
    step = _step(rollout)
    return (
        (rule.started_before is None or rollout.start_time < rule.started_before)
        and (rule.finished_before is None or ended < rule.finished_before)
        and (first_kept is None or (step is not None and step < first_kept))
    )


def _step(rollout: Rollout) -> int | None:
    step = rollout.metadata.get("step")
    return step if isinstance(step, int) else None


def shrink(file: Path) -> None:
    """Give the space of what was dropped back to the disk. It needs as much free space for a while; StoreError where that fails."""
    try:
        connection = sqlite3.connect(file, isolation_level=None)
        try:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreError(
            f"store journal {file}: the work is done, and the file could not be written anew without its free space: {error}; that "
            "space is used again by what comes, or try the command again"
        ) from error


def _size(file: Path | None) -> int | None:
    return file.stat().st_size if file is not None and file.is_file() else None


def _sum(found: list[_Found], before: int | None, after: int | None) -> Cleared:
    return Cleared(
        len(found), sum(one[1] for one in found), sum(one[2] for one in found), before, after
    )
