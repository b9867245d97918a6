"""The span half of the client: batches in columns, spans as objects, their numbers.

What it is: `add_spans` and `read_spans` move columns and are the fast way; `add_span`, `add_many_spans`, `query_spans` are
agent-lightning's calls with objects.
Who calls it: `agl_ray.store.client.LightningStore` inherits it. Test alone: tests/store_catalogue/spans.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from agl_ray.spans.objects import span_object, span_row
from agl_ray.store import contract, span_filters, span_runs
from agl_ray.store.journals.base import AttemptKey
from agl_ray.store.payload import Payloads, pack, rows_of, table_of
from agl_ray.store.queries import StoreQueries
from agl_ray.store.span_runs import Run
from agl_ray.store.spans import SpanItem
from agl_ray.types import AglError, NotFound, PaginatedResult, Span, new_id
from agl_ray.types.errors import KnownSpans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

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
        item = span_item(rollout_id, attempt_id, batch, batch_id)
        (answer,) = await self._call("add_spans", [item], size=len(item.payload))
        if isinstance(answer, AglError):
            raise answer
        return list(range(answer.first, answer.first + answer.number))

    # Spans as objects.

    async def add_span(self, span: Span) -> Span | None:
        """Store a span; it comes back with the ids and times it was given. None where the store has a span of this id in this attempt.

        An explicit `sequence_id` is kept and pushes its rollout's numbers up."""
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    async def add_many_spans(self, spans: Sequence[Span]) -> list[Span]:
        """Store spans of any attempts; those that the store had not, in the given order."""
        rows = [span_row(one) for one in spans]
        numbers = await self.add_span_rows(rows)
        stored = zip(rows, numbers, strict=True)
        return [span_object(row | {"sequence_id": one}) for row, one in stored if one is not None]

    async def add_otel_span(
        self,
        rollout_id: str,
        attempt_id: str,
        readable_span: ReadableSpan,
        sequence_id: int | None = None,
    ) -> Span | None:
        """Store an ended span of the OpenTelemetry SDK (see `agl_ray.spans.otel`); None where the store has it."""
        from agl_ray.spans.otel import span_of_readable

        return await self.add_span(
            span_of_readable(rollout_id, attempt_id, readable_span, sequence_id)
        )

    async def add_span_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
        """Store spans given as rows for `agl_ray.spans.span_batch`, each once by its span id; per row its sequence id, None where
        the store had it. A `sequence_id` in a row is kept."""
        numbers: list[int | None] = [None] * len(rows)
        runs = span_runs.runs_of(rows)
        while runs:
            items = [one.item(rows) for one in runs]
            again = [one._replace(again=True) for one in items]
            size = sum(len(one.payload) for one in items)
            answers = await self._call("add_spans", items, repeat=(again,), size=size)
            left: list[Run] = []
            for run, answer in zip(runs, answers, strict=True):
                if isinstance(answer, KnownSpans):
                    left += run.without(answer, rows)
                elif isinstance(answer, AglError):
                    raise answer
                else:
                    for offset, place in enumerate(run.places):
                        numbers[place] = answer.first + offset
            runs = left
        return numbers

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """A number for a span to come, of its rollout; no other span gets it. NotFound where the attempt is unknown."""
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(self, pairs: Sequence[AttemptKey]) -> list[int]:
        """One number for each (rollout id, attempt id), in order."""
        keys = [(rollout_id, attempt_id) for rollout_id, attempt_id in pairs]
        numbers: list[int] = await self._call("next_sequence_ids", keys) if keys else []
        return numbers

    # Reading.

    async def read_spans(self, attempts: Sequence[AttemptKey]) -> pa.Table:
        """The spans of these attempts as a table in SPAN_SCHEMA, in order of (given attempts, sequence_id); a batch stays together
        where somebody chose numbers in the middle of it."""
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


def span_item(
    rollout_id: str, attempt_id: str, batch: pa.RecordBatch | bytes, batch_id: str | None
) -> SpanItem:
    """A batch on its way. InputError where it is none of this attempt in SPAN_SCHEMA."""
    payload, count = pack(batch, (rollout_id, attempt_id))
    return SpanItem(rollout_id, attempt_id, batch_id or new_id("ba"), count, payload)
