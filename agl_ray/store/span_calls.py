"""The span half of the client: batches in columns, spans as objects, their numbers.

What it is: `add_spans` and `read_spans` move columns and are the fast way; `add_span`, `add_many_spans`, `query_spans` are
agent-lightning's calls with objects.
Who calls it: `agl_ray.store.client.LightningStore` inherits it. Test alone: tests/store_catalogue/spans.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from agl_ray.spans.objects import span_object
from agl_ray.store import contract, span_filters
from agl_ray.store.payload import Payloads, pack, rows_of, table_of
from agl_ray.store.queries import StoreQueries
from agl_ray.store.state import AttemptKey
from agl_ray.types import AglError, NotFound, PaginatedResult, Span, new_id

if TYPE_CHECKING:
    from agl_ray.store.state import BatchEntry

READ_ATTEMPTS = 256  # attempts per read_spans call


class SpanCalls(StoreQueries):
    """Writing and reading of spans."""

    async def add_spans(
        self,
        rollout_id: str,
        attempt_id: str,
        batch: pa.RecordBatch | bytes,
        batch_id: str | None = None,
    ) -> list[int]:
        """Store a batch in SPAN_SCHEMA (or its IPC stream); the answer, its sequence ids, comes when it is journalled.

        `batch_id` (unique in its attempt) makes a repetition by the caller harmless. Calls made at the same time travel together.
        """
        payload, count = pack(batch, (rollout_id, attempt_id))
        item = (rollout_id, attempt_id, batch_id or new_id("ba"), count, payload)
        answers = await self._call("add_spans", [item], size=len(payload))
        first, number = _placed(answers[0])
        return list(range(first, first + number))

    async def read_spans(self, attempts: Sequence[AttemptKey]) -> pa.Table:
        """The spans of these attempts as a table in SPAN_SCHEMA, in order of (given attempts, sequence_id)."""
        keys = [(rollout_id, attempt_id) for rollout_id, attempt_id in attempts]
        parts: list[Payloads] = []
        for start in range(0, len(keys), READ_ATTEMPTS):
            parts.append(await self._call("read_spans", keys[start : start + READ_ATTEMPTS]))
        return table_of(parts)

    async def query_span_rows(
        self, rollout_id: str, attempt_id: str | None = None
    ) -> list[dict[str, Any]]:
        """Spans as plain rows of SPAN_SCHEMA in order of sequence; `attempt_id` None = all attempts, `latest` = the newest.
        NotFound where the rollout or the attempt is unknown."""
        table = await self._spans_of(rollout_id, attempt_id)
        return rows_of(table.sort_by("sequence_id"))

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: str = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str = "sequence_id",
        sort_order: str = "asc",
    ) -> PaginatedResult[Span]:
        """Spans of a rollout (of one attempt: `attempt_id`, or `latest`) as objects; none where it is unknown.

        `filter_logic` joins the filters; with `or`, too, rollout and attempt remain binding. Filters run over columns: only the spans of the
        page become objects.
        """
        filters = span_filters.checked(
            exact={"trace_id": trace_id, "span_id": span_id, "parent_id": parent_id, "name": name},
            contains={
                "trace_id": trace_id_contains,
                "span_id": span_id_contains,
                "parent_id": parent_id_contains,
                "name": name_contains,
            },
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
        )
        contract.check_page(limit, offset)
        try:
            table = filters.apply(await self._spans_of(rollout_id, attempt_id))
        except NotFound:
            return PaginatedResult([], limit, offset, 0)
        page = table.slice(offset, None if limit < 0 else limit)
        items = [span_object(row) for row in rows_of(page)]
        return PaginatedResult(items, limit, offset, table.num_rows)

    async def _spans_of(self, rollout_id: str, attempt_id: str | None) -> pa.Table:
        """NotFound where the rollout or the attempt is unknown."""
        if attempt_id is None:
            attempts = await self._call("query_attempts", rollout_id)
        elif attempt_id == "latest":
            latest = await self.get_latest_attempt(rollout_id)
            attempts = [] if latest is None else [latest]
        else:
            return await self.read_spans([(rollout_id, attempt_id)])
        return await self.read_spans([(rollout_id, one.attempt_id) for one in attempts])


def _placed(answer: BatchEntry | AglError) -> BatchEntry:
    """Where the store put a batch, or its error raised."""
    if isinstance(answer, AglError):
        raise answer
    return answer
