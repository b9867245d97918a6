"""A running store read through its HTTP door: what `agl-ray store ls`, `show` and `export` do with `http://host:port`.

What it is: `open_door(url, api_key)` gives an `Archive` over the client's reads. Nothing is of one moment here: the store goes on while it is
read, page by page. What the client is not told stays open: ordinals of creation, places in the queue, the batches spans came in (an
import puts rollouts in order of creation, and names batches by their places).
Who calls it: `agl_ray.store.archive`. Test alone: tests/unit/test_store_archive_http.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pyarrow as pa

from agl_ray.store.archive import PAGE, Archive, Placed
from agl_ray.store.client import LightningStore
from agl_ray.store.journals.base import AttemptKey, Live, SpanTotals
from agl_ray.store.tables import BATCH_ID
from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    ResourcesUpdate,
    Rollout,
    Worker,
)

AWAY_SECONDS = 5.0  # a wrong address should be said soon
SPANS_AT_ONCE = 500  # of one question (one attempt at least); with 4k tokens each about 25 MB
ALIKE = 100  # ids that are looked at for a beginning
VALUES_AT_ONCE = 50


class DoorArchive(Archive):
    """The records of the store behind `client`. Somebody serves it, so it is alive."""

    alive = True

    def __init__(self, client: LightningStore, live: Live) -> None:
        self._client = client
        self.live = live

    async def rollouts(
        self,
        *,
        status_in: Sequence[str] | None = None,
        mode: str | None = None,
        newest_first: bool = False,
        most: int | None = None,
    ) -> AsyncIterator[list[Placed]]:
        after: tuple[None, str] | None = None
        left = most
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = await self._client.query_rollouts(
                status_in=status_in,
                mode=mode,
                sort_order="desc" if newest_first else "asc",
                limit=size,
                after=after,
            )
            plain = [
                one.rollout if isinstance(one, AttemptedRollout) else one for one in page.items
            ]
            if plain:
                yield [Placed(one, None, 0) for one in plain]
            if len(plain) < size:
                return
            after = (None, plain[-1].rollout_id)
            left = None if left is None else left - len(plain)

    async def rollout(self, rollout_id: str) -> Rollout | None:
        return await self._client.get_rollout_by_id(rollout_id)

    async def ids_like(self, start: str) -> list[str]:
        found = await self._client.query_rollouts(rollout_id_contains=start, limit=ALIKE)
        ids = [
            one.rollout.rollout_id if isinstance(one, AttemptedRollout) else one.rollout_id
            for one in found.items
        ]
        return sorted(one for one in ids if one.startswith(start))

    async def attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        found = await self._client.attempts_of(rollout_ids)
        return sorted(found, key=lambda one: (one.rollout_id, one.sequence_id))

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        """Their sizes are not known (0)."""
        place = {rollout_id: i for i, rollout_id in enumerate(rollout_ids)}
        found = [one for one in await self._client.attempts_of(rollout_ids) if one.num_spans]
        found.sort(key=lambda one: (place[one.rollout_id], one.sequence_id))
        return [SpanTotals((one.rollout_id, one.attempt_id), one.num_spans, 0, 0) for one in found]

    async def spans(self, totals: Sequence[SpanTotals]) -> AsyncIterator[pa.Table]:
        keys: list[AttemptKey] = []
        number = 0
        for one in totals:
            if keys and number + one.number > SPANS_AT_ONCE:
                yield await self._spans(keys)
                keys, number = [], 0
            keys.append(one.key)
            number += one.number
        if keys:
            yield await self._spans(keys)

    async def _spans(self, keys: Sequence[AttemptKey]) -> pa.Table:
        table = (await self._client.read_spans(keys)).combine_chunks()
        return table.append_column(BATCH_ID, pa.nulls(table.num_rows, BATCH_ID.type))

    async def resources(self) -> AsyncIterator[list[tuple[ResourcesUpdate, int | None]]]:
        after: tuple[float, str] | None = None
        while True:
            found = await self._client.query_resources(
                sort_by="update_time", limit=PAGE, after=after
            )
            if found.items:
                yield [(one, None) for one in found.items]
            if len(found.items) < PAGE:
                return
            after = (found.items[-1].update_time, found.items[-1].resources_id)

    async def workers(self) -> list[Worker]:
        return list((await self._client.query_workers()).items)

    async def values(self) -> AsyncIterator[list[tuple[str, bytes]]]:
        keys = await self._client.list_state()
        for start in range(0, len(keys), VALUES_AT_ONCE):
            some = keys[start : start + VALUES_AT_ONCE]
            found = await asyncio.gather(*(self._client.get_state(key) for key in some))
            pairs = zip(some, found, strict=True)
            if known := [(key, value) for key, value in pairs if value is not None]:
                yield known


@asynccontextmanager
async def open_door(url: str, api_key: str | None) -> AsyncIterator[Archive]:
    """The running store at `url`. InputError: no address, a wrong key; StoreError: something else answers there; WaitTimeout: nothing does."""
    client = LightningStore.http(url, api_key, away_seconds=AWAY_SECONDS)
    try:
        counts = await client.statistics()
        ends = {**counts["attempts_by_reason"], "": counts["attempts_open"]}
        live = Live(
            rollouts_by_status={k: n for k, n in counts["rollouts_by_status"].items() if n},
            attempts_by_reason={k: n for k, n in ends.items() if n},
            num_resources=counts["resources"],
            num_spans=counts["spans"],
            span_bytes=counts["span_bytes"],
        )
        yield DoorArchive(client, live)
    finally:
        await client.transport.close()
