"""A journal whose records, spans and events are encrypted before they reach the journal inside.

What it is: `Encrypted(journal, algorithm, keys)`. Encrypted are the bodies of all records (rollouts, attempts, resources, workers, state), every span payload
and the bodies of events. Readable stay: the kind, key, position and columns of a record (`COLUMNS`: ids, status, mode, end reason,
times, versions), the place, batch id and number of a batch of spans, the sizes of everything, the number of an event, and that the
journal is encrypted. Each value is bound to its record: moved to another one it does not decrypt. What this does not notice is an
older value of the same record put back, or a column that was changed.
Values are sealed with data keys, made at random at each opening and kept in a meta row, sealed with the newest of the caller's keys.
So changing keys is: put the new key first, open once (everything is sealed under it then, new values with a data key that the old
key never saw), take the old key away. A missing or wrong key, a plain journal, or another algorithm is a StoreError at `open`.
Who calls it: `agl_ray.store.journals.opening`. Test alone: tests/unit/test_store_encrypted.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from agl_ray.ops.encryption import KEYS_VARIABLE, Algorithm, FieldCipher
from agl_ray.store.journals.base import (
    AttemptKey,
    BatchEntry,
    EventRow,
    Journal,
    Live,
    Page,
    Query,
    Row,
    SpanRow,
    SpanTotals,
)
from agl_ray.store.journals.marks import ENCRYPTION, is_empty, mark_of
from agl_ray.types import StoreError

T = TypeVar("T")

MOST_VALUES = 2**31  # sealed with one data key: half of what random nonces of 96 bits allow
LARGE_BYTES = 2**20  # from here on a thread does it: the event loop would stand still


class Encrypted:
    """`journal`, encrypted. keys: of AGL_ENCRYPTION_KEYS, newest first; a bad one is a ConfigError that names its place.

    Whoever owns it opens and closes only this one, not the journal inside. reading: over a journal that is opened for reading alone; no
    data key is made."""

    def __init__(
        self, journal: Journal, algorithm: Algorithm, keys: Sequence[str], *, reading: bool = False
    ) -> None:
        self._inner = journal
        self._reading = reading
        self._master = FieldCipher(algorithm, keys, KEYS_VARIABLE)
        self._data: FieldCipher | None = None
        self._keys: list[str] = []  # data keys, newest first
        self._num_values = 0
        self.marks = frozenset({ENCRYPTION}) | getattr(journal, "marks", frozenset())

    @property
    def durable(self) -> bool:
        return self._inner.durable

    # Keys.

    async def open(self, *, must_exist: bool = False) -> Live:
        """Open the journal inside, then its data keys. After a StoreError, `close` it."""
        live = await self._inner.open(must_exist=must_exist)
        mark = await mark_of(self._inner, ENCRYPTION)
        if mark is None and not await is_empty(self._inner, live):
            raise StoreError(
                "store journal: encryption is on and this journal was written without it; set store.encryption to off, or "
                "start a new journal (nothing is encrypted afterwards)"
            )
        self._keys = [] if mark is None else self._opened_keys(mark.body)
        if not self._reading:
            await self._inner.write([self._new_data_key()], [])
        elif self._keys:  # none: the store has not written anything yet
            self._data = self._cipher_of(self._keys)
        return live._replace(
            open_attempts=self._shown(live.open_attempts),
            workers=self._shown(live.workers),
            latest_resources=live.latest_resources and self._shown([live.latest_resources])[0],
        )

    def _opened_keys(self, body: bytes) -> list[str]:
        """The data keys of the journal. StoreError where the caller's keys do not open them."""
        try:
            mark = json.loads(body)
            algorithm, sealed = mark["algorithm"], [base64.b64decode(key) for key in mark["keys"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                "store journal: the row of its encryption keys is damaged; restore the journal from a copy"
            ) from error
        if algorithm != self._master.algorithm:
            raise StoreError(
                f"store journal: it is encrypted with {algorithm} and store.encryption is {self._master.algorithm}; set it "
                f"to {algorithm}"
            )
        return [self._master.decrypt(key, "store journal", "data key").decode() for key in sealed]

    def _new_data_key(self) -> Row:
        """Seal what comes from now on with a new key; the row that keeps it must be written first, or with it."""
        self._keys.insert(0, FieldCipher.new_key())
        self._data = self._cipher_of(self._keys)
        self._num_values = 0
        sealed = [
            self._master.encrypt(key.encode(), "store journal", "data key") for key in self._keys
        ]
        body = {
            "algorithm": self._master.algorithm,
            "keys": [base64.b64encode(key).decode() for key in sealed],
        }
        return Row("meta", ENCRYPTION, 0, (), json.dumps(body).encode())

    def _cipher_of(self, keys: Sequence[str]) -> FieldCipher:
        return FieldCipher(self._master.algorithm, keys, "the journal's data keys")

    # Values.

    @property
    def _cipher(self) -> FieldCipher:
        if self._data is None:
            raise StoreError("store journal: it is not open")
        return self._data

    def _hidden(self, rows: Sequence[Row]) -> list[Row]:
        return [
            row
            if row.kind == "meta"
            else row._replace(body=self._cipher.encrypt(row.body, row.kind, row.key))
            for row in rows
        ]

    def _shown(self, rows: Sequence[Row]) -> list[Row]:
        return [
            row
            if row.kind == "meta"
            else row._replace(body=self._cipher.decrypt(row.body, row.kind, row.key))
            for row in rows
        ]

    def _hidden_spans(self, spans: Sequence[SpanRow]) -> list[SpanRow]:
        return [
            span._replace(payload=self._cipher.encrypt(span.payload, *_place(span)))
            for span in spans
        ]

    def _shown_spans(self, spans: Sequence[SpanRow]) -> list[SpanRow]:
        return [
            span._replace(payload=self._cipher.decrypt(span.payload, *_place(span)))
            for span in spans
        ]

    # The journal.

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        self._num_values += len(rows) + len(spans) + len(events)
        keys = [self._new_data_key()] if self._num_values > MOST_VALUES else []
        size = sum(len(span.payload) for span in spans) + sum(len(row.body) for row in rows)
        hidden = await _run(size, lambda: (self._hidden(rows), self._hidden_spans(spans)))
        await self._inner.write(
            [*keys, *hidden[0]],
            hidden[1],
            [
                EventRow(one.number, self._cipher.encrypt(one.body, "event", str(one.number)))
                for one in events
            ],
        )

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        return await self._read(await self._inner.rows(kind, keys))

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        return await self._read(await self._inner.attempts_of(rollout_ids))

    async def query(self, query: Query) -> Page:
        page = await self._inner.query(query)
        return page._replace(rows=await self._read(page.rows))

    async def _read(self, rows: list[Row]) -> list[Row]:
        return await _run(sum(len(row.body) for row in rows), lambda: self._shown(rows))

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        spans = await self._inner.payloads(keys)
        return await _run(
            sum(len(span.payload) for span in spans), lambda: self._shown_spans(spans)
        )

    async def events(self, after: int, limit: int) -> list[EventRow]:
        return [
            EventRow(one.number, self._cipher.decrypt(one.body, "event", str(one.number)))
            for one in await self._inner.events(after, limit)
        ]

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        return await self._inner.span_totals(rollout_ids)

    async def keys(self, kind: str, prefix: str) -> list[str]:
        return await self._inner.keys(kind, prefix)

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        return await self._inner.find_batch(key, batch_id)

    async def drop_events(self, up_to: int) -> None:
        await self._inner.drop_events(up_to)

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        await self._inner.forget(rollout_ids)

    async def close(self) -> None:
        self._data, self._keys = None, []
        await self._inner.close()


def _place(span: SpanRow) -> tuple[str, ...]:
    return ("spans", *span.key, span.batch_id, str(span.first), str(span.number))


async def _run(size: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if size >= LARGE_BYTES else work()
