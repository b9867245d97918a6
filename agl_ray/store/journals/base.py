"""What a journal must do: keep the store's records and span payloads, and answer questions about them.

What it is: `Journal`, the protocol; the rows that go in and out; `COLUMNS`, which are the fields of a record that questions may name.
A record rests as its key, its columns in plain sight and its body (JSON bytes of the whole record, which an encrypting journal
hides); a batch of spans as its place and its payload. A journal knows no rule of the state machine.
Who calls it: `agl_ray.store.base` (the core); journals implement it, and wrap one another (`encrypted`, `outside`). Test alone:
tests/unit/test_store_journal_contract.py, one suite over every journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

AttemptKey = tuple[str, str]
"""(rollout_id, attempt_id)"""

COLUMNS: dict[str, dict[str, type]] = {
    "rollout": {
        "created": int,  # ordinal of creation, never changes
        "status": str,
        "mode": str,
        "start_time": float,
        "end_time": float,
        "resources_id": str,
    },
    "attempt": {
        "rollout_id": str,
        "attempt_id": str,
        "status": str,
        "end_reason": str,  # None: the attempt is open
        "worker_id": str,
        "start_time": float,
        "end_time": float,
    },
    "resources": {"version": int, "create_time": float, "update_time": float},
    "worker": {"status": str},
    "state": {},
    "meta": {},
}
"""Per kind of record the columns beside `key`, `position` and `body`; any of them may be None. `meta` is the journal's own
business (fingerprints, key checks), the others are the store's."""

FIXED: dict[str, set[str]] = {
    "rollout": {"created", "start_time"},
    "attempt": {"position", "rollout_id", "attempt_id", "start_time"},
}
"""What stays as it was first written, for as long as the record lives: a journal need not write it again."""


class Row(NamedTuple):
    """One record. `columns` has the values of `COLUMNS[kind]`, in that order.

    `key`: rollout id; `rollout_id/attempt_id`; resources id; worker id; the key of a state or meta value.
    `position`: a rollout's place in the queue (0: it does not wait); an attempt's sequence id; of resources the number of the update
    (the highest is the latest); 0 for the rest.
    """

    kind: str
    key: str
    position: int
    columns: tuple[Any, ...]
    body: bytes


class BatchEntry(NamedTuple):
    """Where a batch of spans was put: sequence ids first .. first + number - 1 of its rollout."""

    first: int
    number: int


class SpanRow(NamedTuple):
    """A batch of spans. `payload`: see `agl_ray.store.payload`."""

    batch_id: str  # unique within its attempt
    key: AttemptKey
    first: int
    number: int  # of spans
    payload: bytes


class SpanTotals(NamedTuple):
    """What is known of an attempt's spans without reading them."""

    key: AttemptKey
    number: int
    last: int  # highest sequence id
    size: int  # payload bytes


class Condition(NamedTuple):
    """`field` is `key` or a column. `is_in`: any of these values (None among them: the column is empty). `contains`: a part of the text,
    case counts. Exactly one of the two is given."""

    field: str
    is_in: tuple[Any, ...] | None = None
    contains: str | None = None


class Query(NamedTuple):
    """Records of one kind. All of `must` hold and, where `where` is not empty, all of it (or any, with `any_of`).

    Order: by `order_by` (`key`, `position` or a column; None sorts first), then by key, both descending where `descending`.
    after: (value of `order_by`, key) of the last row seen: only rows behind it. limit: -1 = all. count: also count the
    matching rows before `after`, `offset` and `limit`.
    """

    kind: str
    must: tuple[Condition, ...] = ()
    where: tuple[Condition, ...] = ()
    any_of: bool = False
    order_by: str = "key"
    descending: bool = False
    after: tuple[Any, str] | None = None
    limit: int = -1
    offset: int = 0
    count: bool = False  # type: ignore[assignment]  # tuple.count is of no use here


class Page(NamedTuple):
    rows: list[Row]
    total: int | None  # None unless counted


class Live(NamedTuple):
    """What a store needs in memory to go on: everything open, and sums over the rest."""

    starts: int = 1  # how often the journal was opened, this time included
    waiting: list[tuple[str, int]] = []  # (rollout id, position) by position
    open_attempts: list[Row] = []  # end_reason is None; by key
    open_batches: list[tuple[str, AttemptKey, BatchEntry]] = []  # of open attempts
    workers: list[Row] = []
    latest_resources: Row | None = None
    rollouts_by_status: dict[str, int] = {}
    rollouts_by_mode: dict[tuple[str, str | None], int] | None = (
        None  # (status, mode); None: not known
    )
    attempts_by_reason: dict[str, int] = {}  # key "" : open ones
    num_resources: int = 0
    num_spans: int = 0
    span_bytes: int = 0
    last_created: int = 0
    last_position: int = 0  # the highest of rollouts and resources
    last_event: int = 0


class EventRow(NamedTuple):
    """A change of state for subscribers. `number` rises by one from event to event."""

    number: int
    body: bytes  # JSON


class Journal(Protocol):
    """All calls are coroutines of the store's event loop; reads and the writer may overlap. Every failure is a StoreError that names
    the journal, what failed and what to do. A payload that comes back damaged is a StoreError, never returned."""

    durable: bool

    async def open(self, *, must_exist: bool = False) -> Live:
        """Own the journal (StoreError where another living store does), make what is missing, read what the store needs.

        must_exist: a store that restarts expects its data; it is a StoreError when they are gone."""

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        """One transaction; on return it survives the machine. A row replaces the one of the same kind and key."""

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        """Those of these keys that are there, in any order."""

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        """All attempts of these rollouts, by (rollout, position)."""

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        """Of every attempt of these rollouts that has spans."""

    async def query(self, query: Query) -> Page: ...

    async def keys(self, kind: str, prefix: str) -> list[str]:
        """The keys that start with `prefix`, sorted."""

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        """The spans of these attempts, per attempt in order of sequence."""

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        """Where a batch of this attempt was put, if it is there."""

    async def events(self, after: int, limit: int) -> list[EventRow]:
        """Events with a number above `after`, in order."""

    async def drop_events(self, up_to: int) -> None:
        """Forget events up to this number."""

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        """Remove these rollouts with their attempts and spans, in one transaction."""

    async def close(self) -> None: ...
