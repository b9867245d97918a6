"""What a store that starts needs from its collections: everything open, and sums over the rest, each from an index.

Who calls it: `agl_ray.store.journals.mongo.MongoJournal.open`. Test alone: tests/unit/test_store_mongo.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from agl_ray.store.journals.base import BatchEntry, Live, Row
from agl_ray.store.journals.mongo_documents import EVENT, SPAN, Document, key_of, row_of


async def read_live(database: AsyncDatabase[Any], run_id: str) -> Live:
    """Everything in `Live` but `starts`; `last_event` of the events that are there."""
    mine = {"run": run_id}
    waiting = database["rollout"].find(
        {**mine, "position": {"$gt": 0}}, projection=["key", "position"], sort=[("position", 1)]
    )
    workers = database["worker"].find(mine, sort=[("_id", 1)])
    latest = await _highest(database, "resources", run_id, "position")
    attempts = await _open_attempts(database, run_id)
    sums = {"_id": None, "number": {"$sum": "$number"}, "size": {"$sum": "$size"}}
    spans = await _grouped(database, SPAN, run_id, sums)
    last_rollout = await _highest(database, "rollout", run_id, "position")
    positions = [one["position"] for one in (last_rollout, latest) if one]
    last_created = await _highest(database, "rollout", run_id, "created")
    last_event = await _highest(database, EVENT, run_id, "number")
    resources = await _counts(database, "resources", run_id, None)
    return Live(
        waiting=[(one["key"], one["position"]) for one in await waiting.to_list()],
        open_attempts=attempts,
        open_batches=await _open_batches(database, run_id, attempts),
        workers=[row_of("worker", one) for one in await workers.to_list()],
        latest_resources=row_of("resources", latest) if latest else None,
        rollouts_by_status=await _counts(database, "rollout", run_id, "$status"),
        attempts_by_reason=await _counts(database, "attempt", run_id, "$end_reason"),
        num_resources=sum(resources.values()),
        num_spans=spans[0]["number"] if spans else 0,
        span_bytes=spans[0]["size"] if spans else 0,
        last_created=last_created["created"] or 0 if last_created else 0,
        last_position=max(positions, default=0),
        last_event=last_event["number"] if last_event else 0,
    )


async def _open_attempts(database: AsyncDatabase[Any], run_id: str) -> list[Row]:
    found = database["attempt"].find({"run": run_id, "end_reason": None}, sort=[("_id", 1)])
    return [row_of("attempt", one) for one in await found.to_list()]


async def _open_batches(
    database: AsyncDatabase[Any], run_id: str, attempts: list[Row]
) -> list[tuple[str, tuple[str, str], BatchEntry]]:
    is_open = {(row.columns[0], row.columns[1]) for row in attempts}
    ids = sorted({rollout_id for rollout_id, _ in is_open})
    names = ["rollout_id", "attempt_id", "batch_id", "first", "number"]
    batches: list[tuple[str, tuple[str, str], BatchEntry]] = []
    for start in range(0, len(ids), 1000):
        match = {"run": run_id, "rollout_id": {"$in": ids[start : start + 1000]}}
        batches += [
            (one["batch_id"], key_of(one), BatchEntry(one["first"], one["number"]))
            for one in await database[SPAN].find(match, projection=names).to_list()
            if key_of(one) in is_open
        ]
    return batches


async def _highest(
    database: AsyncDatabase[Any], collection: str, run_id: str, field: str
) -> Document | None:
    found: Document | None = await database[collection].find_one(
        {"run": run_id}, sort=[(field, -1)]
    )
    return found


async def _counts(
    database: AsyncDatabase[Any], collection: str, run_id: str, field: str | None
) -> dict[str, int]:
    """How many documents have each value of `field`; an empty one counts as ""."""
    found = await _grouped(database, collection, run_id, {"_id": field, "n": {"$sum": 1}})
    counts: Counter[str] = Counter()
    for one in found:  # none and empty are two groups of the database
        counts[one["_id"] or ""] += one["n"]
    return dict(counts)


async def _grouped(
    database: AsyncDatabase[Any], collection: str, run_id: str, group: Document
) -> list[Document]:
    steps = [{"$match": {"run": run_id}}, {"$group": group}]
    return await (await database[collection].aggregate(steps)).to_list()
