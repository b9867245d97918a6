"""Rejection sampling: a store's best rollouts as rows to fine-tune on, in the exact token ids of their calls.

Only the latest attempts that ended `ok` with a reward, of training rollouts (held-out rows stay held out). What the policy sampled is learned;
calls that failed, were forced into a form, sampled at temperature 0, or answered by another model are context, as in training.

Called by `agl-ray sft`. Test it alone: tests/unit/test_learner_sft_store.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from agl_ray.store.archive import Archive
from agl_ray.store.journals.base import SpanTotals
from agl_ray.trajectory.ragged import Rows
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import Attempt, EndReason, InputError, Rollout


class Chosen(NamedTuple):
    """An attempt to learn from. row: its input, as text: what `best` counts by."""

    rollout_id: str
    attempt_id: str
    reward: float
    row: bytes


@dataclass(frozen=True, slots=True)
class StoreRows:
    """rows: token ids and weights alone. counts: rollouts read, and what became of those that are not in the rows, by reason."""

    rows: Rows
    counts: dict[str, int]


async def best_rollouts(
    archive: Archive, *, min_reward: float | None = None, best: int | None = None
) -> StoreRows:
    """The rows of the rollouts with a reward of `min_reward` or more; of each input only the `best` with the highest rewards (of equal
    ones the older). InputError where none is left, saying why."""
    counts: Counter[str] = Counter()
    by_row: defaultdict[bytes, list[Chosen]] = defaultdict(list)
    async for page in archive.rollouts():
        latest = {
            one.rollout_id: one
            for one in await archive.attempts([placed.rollout.rollout_id for placed in page])
        }
        for placed in page:
            rollout = placed.rollout
            counts["rollouts"] += 1
            found = _judged(rollout, latest.get(rollout.rollout_id), min_reward)
            if isinstance(found, str):
                counts[found] += 1
            else:
                by_row[found.row].append(found)
    chosen: list[Chosen] = []
    for several in by_row.values():
        kept = sorted(several, key=lambda one: -one.reward)[:best]
        counts["not_best"] += len(several) - len(kept)
        chosen += kept
    if not chosen:
        raise InputError(f"no rollout of the store is left to learn from: {_words(counts)}")
    rows = await _rows(archive, chosen, counts)
    return StoreRows(rows, {name: number for name, number in counts.items() if number})


def _judged(rollout: Rollout, attempt: Attempt | None, min_reward: float | None) -> Chosen | str:
    """The attempt, or why it is not taken."""
    if rollout.mode == "val":
        return "validation"
    if attempt is None or attempt.end_reason is not EndReason.OK:
        return "not_ok"
    if attempt.reward is None:
        return "no_reward"
    if min_reward is not None and attempt.reward < min_reward:
        return "below_min_reward"
    row = msgspec.json.encode(rollout.input, order="sorted")
    return Chosen(rollout.rollout_id, attempt.attempt_id, attempt.reward, row)


async def _rows(archive: Archive, chosen: list[Chosen], counts: Counter[str]) -> Rows:
    wanted = {(one.rollout_id, one.attempt_id) for one in chosen}
    ids = [one.rollout_id for one in chosen]
    totals: list[SpanTotals] = [one for one in await archive.span_totals(ids) if one.key in wanted]
    seen: set[bytes] = set()
    ids_of: list[np.ndarray] = []
    weights_of: list[np.ndarray] = []
    learned_from: set[tuple[str, str]] = set()
    async for spans in archive.spans(totals):
        keys = list(dict.fromkeys(_keys(spans)))
        built = build_rows(spans, keys)
        ends = np.cumsum(built.rows.lengths)
        for row, (end, length) in enumerate(
            zip(ends.tolist(), built.rows.lengths.tolist(), strict=True)
        ):
            ids_R, weights_R = (
                part[end - length : end] for part in (built.rows.ids, built.rows.weights)
            )
            if not weights_R.any():
                continue
            learned_from.add(keys[built.attempt[row]])
            text = ids_R.tobytes() + weights_R.tobytes()
            if text in seen:
                counts["duplicate_rows"] += 1
                continue
            seen.add(text)
            ids_of.append(ids_R)
            weights_of.append(weights_R)
    counts["without_own_tokens"] = len(wanted) - len(learned_from)
    if not ids_of:
        raise InputError(
            f"no rollout of the store has tokens that its own model sampled: {_words(counts)}; only calls that the run's engine answered "
            "are recorded with their token ids"
        )
    return Rows.from_lists(ids_of, weights_of)


def _keys(spans: pa.Table) -> list[tuple[str, str]]:
    columns = (spans[name].to_pylist() for name in ("rollout_id", "attempt_id"))
    return list(zip(*columns, strict=True))


def _words(counts: Counter[str]) -> str:
    return (
        ", ".join(f"{name} {number}" for name, number in counts.items() if number) or "it has none"
    )
