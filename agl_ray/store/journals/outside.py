"""A journal whose large span payloads are files: on a disk, NFS, S3 or GCS, whatever the journal inside is.

What it is: `Outside(journal, uri)`. Payloads of more than `over_kib` go into one segment file per commit, which is written and synced before
the transaction of the journal inside; that one keeps a pointer (file, range, checksum) in the payload's place. Smaller ones
stay inside. Reads fetch by range.
Files lie in a folder of this journal's own under `uri` (its random name is in the journal), named by the sitting (one opening) and
the number of the commit. The mark row says, in the same transaction as the pointers, which commit was the last: so a crash
between file and transaction leaves exactly one file that nobody names, the next one of that sitting, and the next opening
removes that and nothing else. Other journals under the same `uri` are never looked at. A file whose rollouts were all
forgotten is removed. Sizes in the answers are those of the payloads, wherever they rest.
Who calls it: `agl_ray.store.journals.opening`. Test alone: tests/unit/test_store_outside.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from agl_ray.config.store_address import without_keys
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
from agl_ray.store.journals.marks import OUTSIDE, is_empty, mark_of
from agl_ray.types import StoreError, WaitTimeout
from agl_ray.waits import wait

if TYPE_CHECKING:
    from agl_ray.store.journals.segments import Place, Segments

T = TypeVar("T")

OVER_KIB = 16  # below, a pointer and a round trip cost more than the payload
FILE_SECONDS = 300.0
NUM_THREADS = 4
FORGETTING = "outside-forgetting"

_INSIDE, _POINTER = b"I", b"P"


class _Mark(msgspec.Struct, frozen=True):
    """The journal's row about its files. `extra`: payload bytes minus the bytes kept inside for them."""

    folder: str
    sitting: str
    last: int = 0  # number of the newest committed file of this sitting
    files: int = 0  # of all sittings, that hold something
    extra: int = 0


class _Intent(msgspec.Struct, frozen=True):
    """A `forget` that has begun: which payloads go, and how many of each file."""

    keys: list[tuple[str, str]]
    dead: dict[str, int]
    extra: int


class _Kept(NamedTuple):
    """What rests inside for a payload: itself, or its place."""

    payload: bytes
    place: Place | None

    @property
    def size(self) -> int:
        return len(self.payload) if self.place is None else self.place.size


class Outside:
    """`journal` with payloads above `over_kib` KiB as files under `uri`. Its owner opens and closes only this one.

    reading: beside the owner, over a journal that is opened for reading alone; nothing is tidied, nothing can be written."""

    def __init__(
        self, journal: Journal, uri: str, over_kib: int = OVER_KIB, *, reading: bool = False
    ) -> None:
        self._inner = journal
        self._uri = without_keys(uri)
        self._over = over_kib * 1024
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store-payloads")
        self._files: Segments | None = None
        self._mark = _Mark("", "")
        self._turn = asyncio.Lock()  # of those who change the mark
        self._refused: str | None = "it was opened for reading alone" if reading else None
        self._reading = reading
        self.marks = frozenset({OUTSIDE}) | getattr(journal, "marks", frozenset())

    @property
    def durable(self) -> bool:
        return self._inner.durable

    # Life.

    async def open(self, *, must_exist: bool = False) -> Live:
        """Open the journal inside, then the folder; remove what a crash left. After a StoreError, `close` it."""
        from agl_ray.store.journals.segments import Segments

        live = await self._inner.open(must_exist=must_exist)
        self._files = await self._run("open the folder", lambda: Segments(self._uri))
        row = await mark_of(self._inner, OUTSIDE)
        if row is None and not await is_empty(self._inner, live):
            raise StoreError(
                f"store journal: store.payload is {self._uri} and this journal was written with its payloads inside; set "
                "store.payload to journal, or start a new journal"
            )
        mark = _Mark(uuid.uuid4().hex, "") if row is None else _decoded(row, _Mark)
        if row is not None:
            await self._run("look at the folder", lambda: self._tidy(mark))
        if self._reading:
            return live._replace(span_bytes=live.span_bytes + mark.extra)
        self._mark = msgspec.structs.replace(mark, sitting=uuid.uuid4().hex[:12], last=0)
        await self._inner.write([_row(OUTSIDE, self._mark)], [])
        await self._settle()
        return live._replace(span_bytes=live.span_bytes + self._mark.extra)

    def _tidy(self, mark: _Mark) -> None:
        """Find the folder, before anybody reads from it; remove the file that the last sitting may have left unnamed."""
        if mark.files and not self._segments.exists(mark.folder):
            raise StoreError(
                f"store journal: its span payloads rest in {self._uri}/{mark.folder}, which is not there; set store.payload "
                "to where that folder is now"
            )
        orphan = f"{mark.folder}/{_segment(mark.sitting, mark.last + 1)}"
        if not self._reading and self._segments.exists(orphan):
            self._segments.remove([orphan])

    async def close(self) -> None:
        self._files = None
        self._threads.shutdown(wait=True)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="store-payloads")
        await self._inner.close()

    # Writing.

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        async with self._turn:
            self._may_write()
            kept, mark, count = await self._put_out(spans)
            changed = [] if mark is self._mark else [_row(OUTSIDE, mark)]
            try:
                await self._inner.write([*rows, *changed, *count], kept, events)
            except BaseException:
                # Whether it was committed is not known: its file's name must not be used again.
                self._refused = "an earlier write failed; open it again"
                raise
            self._mark = mark

    def _may_write(self) -> None:
        if self._refused is not None:
            raise StoreError(f"store journal: {self._refused}")

    async def _put_out(self, spans: Sequence[SpanRow]) -> tuple[list[SpanRow], _Mark, list[Row]]:
        """Write the large payloads to a new file. (rows for inside, the new mark, the file's row)."""
        if not spans:
            return [], self._mark, []
        large = [span for span in spans if len(span.payload) > self._over]
        places: list[Place] = []
        count: list[Row] = []
        last = self._mark.last
        if large:
            last += 1
            name = _segment(self._mark.sitting, last)
            path = f"{self._mark.folder}/{name}"
            payloads = [span.payload for span in large]
            places = await self._run("write", lambda: self._segments.write(path, payloads))
            count = [Row("meta", _count_key(name), 0, (), str(len(large)).encode())]
        out = iter(places)
        kept = [
            span._replace(
                payload=_POINTER + _packed(next(out))
                if len(span.payload) > self._over
                else _INSIDE + span.payload
            )
            for span in spans
        ]
        extra = sum(len(a.payload) - len(b.payload) for a, b in zip(spans, kept, strict=True))
        mark = _changed(self._mark, last=last, files=len(count), extra=extra)
        return kept, mark, count

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        async with self._turn:
            self._may_write()
            keys = [one.key for one in await self._inner.span_totals(rollout_ids)]
            rows = await self._inner.payloads(keys)
            kept = [self._opened(row) for row in rows]
            dead = Counter(one.place.segment for one in kept if one.place is not None)
            extra = sum(one.size - len(row.payload) for one, row in zip(kept, rows, strict=True))
            if rows:
                intent = _Intent([(key[0], key[1]) for key in keys], dict(dead), extra)
                await self._inner.write([_row(FORGETTING, intent)], [])
            await self._inner.forget(rollout_ids)
            if rows:
                await self._settle()

    async def _settle(self) -> None:
        """Finish a `forget` that happened inside: remove files that nothing names, then the note about it."""
        row = await mark_of(self._inner, FORGETTING)
        if row is None or not row.body:
            return
        intent = _decoded(row, _Intent)
        done = Row("meta", FORGETTING, 0, (), b"")
        if await self._inner.span_totals(sorted({key[0] for key in intent.keys})):
            await self._inner.write([done], [])  # it never happened
            return
        names = {name.rpartition("/")[2]: number for name, number in intent.dead.items()}
        counts = [
            (row.key, int(row.body) - names[row.key.removeprefix(_count_key(""))])
            for row in await self._inner.rows("meta", [_count_key(name) for name in names])
        ]
        empty = [
            f"{self._mark.folder}/{key.removeprefix(_count_key(''))}"
            for key, left in counts
            if left <= 0
        ]
        await self._run("remove", lambda: self._segments.remove(empty))
        mark = _changed(self._mark, last=self._mark.last, files=-len(empty), extra=-intent.extra)
        rows = [Row("meta", key, 0, (), str(max(0, left)).encode()) for key, left in counts]
        await self._inner.write([_row(OUTSIDE, mark), *rows, done], [])
        self._mark = mark

    async def drop_events(self, up_to: int) -> None:
        await self._inner.drop_events(up_to)

    # Reading.

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        from agl_ray.store.journals.segments import MissingSegment

        rows = await self._inner.payloads(keys)
        try:
            return await self._fetched(rows)
        except MissingSegment:
            again = await self._inner.payloads(keys)
            if again == rows:
                raise
            return await self._fetched(again)  # some were forgotten meanwhile

    async def _fetched(self, rows: Sequence[SpanRow]) -> list[SpanRow]:
        kept = [self._opened(row) for row in rows]
        by_file: dict[str, list[Place]] = {}
        for one in kept:
            if one.place is not None:
                by_file.setdefault(one.place.segment, []).append(one.place)
        found: dict[Place, bytes] = {}
        for part in await asyncio.gather(
            *(
                self._run("read", partial(self._segments.read, places))
                for places in by_file.values()
            )
        ):
            found.update(part)
        return [
            row._replace(payload=one.payload if one.place is None else found[one.place])
            for row, one in zip(rows, kept, strict=True)
        ]

    def _opened(self, row: SpanRow) -> _Kept:
        from agl_ray.store.journals.segments import Place

        tag, rest = row.payload[:1], row.payload[1:]
        if tag == _INSIDE:
            return _Kept(rest, None)
        try:
            if tag == _POINTER:
                return _Kept(
                    b"", Place(*msgspec.msgpack.decode(rest, type=tuple[str, int, int, int]))
                )
        except msgspec.MsgspecError as error:
            raise self._no_pointer(row) from error
        raise self._no_pointer(row)

    def _no_pointer(self, row: SpanRow) -> StoreError:
        return StoreError(
            f"store journal: the spans {row.first} to {row.first + row.number - 1} of rollout {row.key[0]} are neither in "
            "the journal nor a pointer to a file; restore the journal from a copy"
        )

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        totals = await self._inner.span_totals(rollout_ids)
        sizes: Counter[AttemptKey] = Counter()
        for row in await self._inner.payloads([one.key for one in totals]):
            sizes[row.key] += self._opened(row).size
        return [one._replace(size=sizes[one.key]) for one in totals]

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        return await self._inner.rows(kind, keys)

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        return await self._inner.attempts_of(rollout_ids)

    async def query(self, query: Query) -> Page:
        return await self._inner.query(query)

    async def keys(self, kind: str, prefix: str) -> list[str]:
        return await self._inner.keys(kind, prefix)

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        return await self._inner.find_batch(key, batch_id)

    async def events(self, after: int, limit: int) -> list[EventRow]:
        return await self._inner.events(after, limit)

    # Files.

    @property
    def _segments(self) -> Segments:
        if self._files is None:
            raise StoreError("store journal: it is not open")
        return self._files

    async def _run(self, doing: str, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        on = f"the store's payload files at {self._uri} ({doing})"
        try:
            return await wait(
                loop.run_in_executor(self._threads, work), on=on, seconds=FILE_SECONDS
            )
        except WaitTimeout as error:
            raise StoreError(
                f"store journal: {error}; check that the place can be reached"
            ) from error


def _segment(sitting: str, number: int) -> str:
    return f"{sitting}-{number:08d}.spans"


def _changed(mark: _Mark, *, last: int, files: int, extra: int) -> _Mark:
    """`files` and `extra` more."""
    return _Mark(mark.folder, mark.sitting, last, mark.files + files, mark.extra + extra)


def _count_key(name: str) -> str:
    """Of the row with the number of payloads of a file that are not forgotten."""
    return f"{OUTSIDE}/{name}"


def _packed(place: Iterable[str | int]) -> bytes:
    return msgspec.msgpack.encode(tuple(place))


def _row(key: str, value: msgspec.Struct) -> Row:
    return Row("meta", key, 0, (), msgspec.json.encode(value))


def _decoded(row: Row, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(row.body, type=kind)
    except msgspec.MsgspecError as error:
        raise StoreError(
            f"store journal: its row {row.key!r} about payload files is damaged ({error}); restore the journal from a copy"
        ) from error
