"""The attempts that calls are being answered for: who they are, what they may use, what they have said.

Called by: the door. An attempt is resolved once, when it is first heard of: its rollout, that it is the live attempt, its LLM
resource, and what it has already said (the store's spans: another gateway process may have died). Attempts idle for
`idle_seconds` are forgotten, and so are those that have been silent for a while and of which the store says that they are over; should one
speak again it is resolved anew. The store is asked every `CHECK_SECONDS` whether an attempt
is still the live one; the calls of one that is not are refused. The store is any object with the async methods of `StoreClient`. Test alone:
`pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, as_history
from agl_ray.gateway.record import (
    FAILED_CALL_NAME,
    REFUSED_CALL_NAME,
    counters,
    kept_conversations,
    rebuild,
    unanswered_span,
)
from agl_ray.gateway.session import Session
from agl_ray.types import (
    LLM,
    UNANSWERED_CALL,
    Attempt,
    Conflict,
    InputError,
    NotFound,
    ResourcesUpdate,
    Rollout,
    WaitTimeout,
    named_llm,
)
from agl_ray.waits import wait

CHECK_SECONDS = 2.0  # an attempt that has ended may make calls for so long
SILENT_SECONDS = 10.0  # of an attempt, before the store is asked whether it is over; then of twice as many, and so on
MOST_ASKED = 500  # attempts at once
logger = logging.getLogger(__name__)


class StoreClient(Protocol):
    """The few methods of LightningStore that the gateway needs."""

    async def get_rollout_in_full(
        self, rollout_id: str
    ) -> tuple[Rollout, Attempt | None, ResourcesUpdate | None] | None: ...

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None: ...

    async def add_spans(
        self, rollout_id: str, attempt_id: str, batch: Any, batch_id: str | None = None
    ) -> Any: ...

    async def query_span_rows(
        self, rollout_id: str, attempt_id: str | None = None
    ) -> list[dict[str, Any]]: ...

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, *, metadata: dict[str, Any]
    ) -> Attempt: ...


@dataclass
class Live:
    """An attempt that calls are being answered for: its resource, one token session per role, counters."""

    rollout: Rollout
    llm: LLM
    counts: dict[str, int]  # keys of record.counters
    sessions: dict[str | None, Session] = field(default_factory=dict)
    ended: str | None = (
        None  # the refusal to give, once the store has said that the attempt is over
    )
    last_error: str | None = None
    unanswered_ns: int | None = (
        None  # when the newest call without an answer failed, if none was answered since; the store knows
    )
    disconnects: int = 0
    open_calls: int = 0
    drawn: int = 0  # calls that have got a seed; calls made side by side get different ones
    underway: int = 0  # of the open ones, those admitted (limits.py)
    refused: set[str | None] = field(default_factory=set)  # codes that have a span
    used: float = 0.0
    patience: float = SILENT_SECONDS  # how long it may be silent before the store is asked
    checked: float = 0.0  # when the store last said that the attempt is live
    kept: dict[tuple[str | None, str], list[dict[str, Any]]] = field(default_factory=dict)
    """(role, call id) -> the conversation up to and with its answer, of calls that later ones may name."""

    def keep(
        self, role: str | None, call_id: str, request: CallRequest, result: CallResult
    ) -> None:
        """Remember a conversation that a later call may go on."""
        said = request.messages[1:] if request.instructions else request.messages
        self.kept[role, call_id] = [*said, as_history(result.message())]


class Attempts:
    """See the module's text. `now` is the clock of idle attempts (seconds), for tests."""

    def __init__(
        self,
        store: StoreClient,
        store_timeout_seconds: float,
        idle_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._timeout, self._idle, self._now = (
            store,
            store_timeout_seconds,
            idle_seconds,
            now,
        )
        self._live: dict[tuple[str, str], Live] = {}
        # Weak: a lock lives as long as a call holds it or waits for it, also where the store knows no such attempt.
        self._resolving: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._swept = now()
        self._asking: asyncio.Task[None] | None = None  # which silent attempts are over

    def __len__(self) -> int:
        return len(self._live)

    async def open(self, path: CallPath) -> Live:
        """The live attempt of a path, resolved at its first call, with this call counted as open."""
        key = (path.rollout_id, path.attempt_id)
        self._sweep()
        if key not in self._live:
            lock = self._resolving.setdefault(key, asyncio.Lock())
            try:
                async with lock:
                    if key not in self._live:
                        self._live[key] = await self._resolve(path)
            finally:
                del lock  # or an error's traceback would keep it
        live = self._live[key]
        live.open_calls += 1  # first: what is asked after may not be forgotten meanwhile
        try:
            await self._still_live(path, live)
        except BaseException:
            live.open_calls -= 1
            raise
        live.used, live.patience = self._now(), SILENT_SECONDS
        return live

    async def _still_live(self, path: CallPath, live: Live) -> None:
        """Refusal once the attempt has ended or another took its place; the store is asked now and then, not at each call."""
        if live.ended is not None:
            raise Refusal(410, live.ended, code="attempt_ended")
        if self._now() - live.checked < CHECK_SECONDS:
            return
        live.checked = self._now()
        attempt = await self._ask(self._store.get_latest_attempt(path.rollout_id), f"{path}")
        try:
            _check_live(path, attempt)
        except Refusal as refusal:
            live.ended = refusal.message
            raise

    def _sweep(self) -> None:
        """Forget idle sessions, and ask after silent ones, now and then."""
        now, limit = self._now(), self._idle
        if now - self._swept < min(limit / 10, SILENT_SECONDS / 2):
            return
        self._swept = now
        silent = []
        for key, live in list(self._live.items()):
            idle = 0.0 if live.open_calls else now - live.used
            if idle > limit:
                del self._live[key]
            elif idle > live.patience:
                silent.append(key)
        if silent and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._forget_ended(silent))

    async def _forget_ended(self, keys: list[tuple[str, str]]) -> None:
        """Forget those of these attempts that are over: a run has many, and each holds its whole conversation."""
        for start in range(0, len(keys), MOST_ASKED):
            await self._forget_some(keys[start : start + MOST_ASKED])

    async def _forget_some(self, keys: list[tuple[str, str]]) -> None:
        answers = await asyncio.gather(
            *(self._ask(self._store.get_latest_attempt(key[0]), f"{key}") for key in keys),
            return_exceptions=True,
        )
        for key, answer in zip(keys, answers, strict=True):
            live = self._live.get(key)
            if live is None or live.open_calls:
                continue
            if isinstance(answer, BaseException) and not isinstance(answer, NotFound):
                logger.warning("is attempt %s over? The store did not say: %s", key[1], answer)
            elif (
                isinstance(answer, Attempt)
                and answer.attempt_id == key[1]
                and not answer.status.final
            ):
                live.patience = 2 * (self._now() - live.used)
            else:
                del self._live[key]

    async def _resolve(self, path: CallPath) -> Live:
        found = await self._ask(self._store.get_rollout_in_full(path.rollout_id), f"{path}")
        if found is None:
            raise Refusal(
                404,
                f"rollout {path.rollout_id} is not known to the store",
                code="rollout_not_found",
            )
        rollout, attempt, resources = found
        _check_live(path, attempt)
        llm = self._llm(rollout, resources)
        live = Live(rollout=rollout, llm=llm, counts=counters([]), checked=self._now())
        if attempt is not None and UNANSWERED_CALL in attempt.metadata:
            live.unanswered_ns = 0  # before this process: any call answered here came later
        if attempt is not None and attempt.num_spans:
            rows = await self._ask(
                self._store.query_span_rows(path.rollout_id, path.attempt_id),
                f"the spans of {path}",
            )
            live.counts = counters(rows)
            live.drawn = live.counts["calls"]
            live.sessions = {role: rebuild(rows, role) for role in {row["role"] for row in rows}}
        return live

    @staticmethod
    def _llm(rollout: Rollout, update: ResourcesUpdate | None) -> LLM:
        """The LLM resource that the rollout's metadata names (`resource`), or the only one."""
        if update is None:
            raise Refusal(
                404, f"rollout {rollout.rollout_id} has no resources", code="resource_not_found"
            )
        try:
            named = named_llm(rollout, update.resources)
        except InputError as error:
            raise Refusal(404, str(error), code="resource_not_found") from error
        if named is not None:
            return named
        llms = [one for one in update.resources.values() if isinstance(one, LLM)]
        if len(llms) != 1:
            raise Refusal(
                404,
                f"rollout {rollout.rollout_id} has {len(llms)} LLM resources; expected one, or metadata['resource'] to name one of them",
                code="resource_not_found",
            )
        return llms[0]

    async def _ask(self, awaitable: Any, on: str) -> Any:
        """A store operation under its own deadline; a store that does not answer is a 503."""
        try:
            return await wait(awaitable, on=f"the store: {on}", seconds=self._timeout)
        except WaitTimeout as error:
            raise Refusal(503, str(error), code="store_unavailable", kind="server_error") from error

    async def continued(self, path: CallPath, live: Live, request: CallRequest) -> CallRequest:
        """The request with the whole conversation that its `previous` answer stands for; Refusal 404 where that is not known."""
        name = request.previous or ""
        if (path.role, name) not in live.kept:
            rows = await self._ask(
                self._store.query_span_rows(path.rollout_id, path.attempt_id),
                f"the spans of {path}",
            )
            for call_id, messages in kept_conversations(rows, path.role).items():
                live.kept.setdefault((path.role, call_id), messages)
        before = live.kept.get((path.role, name))
        if before is None:
            raise Refusal(
                404,
                f"Previous response with id 'resp_{name}' not found: expected the id of an answer of this attempt that was not "
                "asked for with store=false",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        own = 1 if request.instructions else 0
        messages = [*request.messages[:own], *before, *request.messages[own:]]
        return msgspec.structs.replace(request, messages=messages)

    async def journal(self, path: CallPath, live: Live, batch: Any, batch_id: str) -> None:
        """Have a batch of spans journalled; Refusal 410 where the store says that the attempt is over."""
        try:
            await self._ask(
                self._store.add_spans(path.rollout_id, path.attempt_id, batch, batch_id=batch_id),
                f"the acknowledgement of call {batch_id} of {path}",
            )
        except (Conflict, NotFound) as error:
            live.ended = f"{path} is over: {error}"
            raise Refusal(410, live.ended, code="attempt_ended") from error

    async def failed(
        self, path: CallPath, live: Live, call_id: str, started_ns: int, error: Exception
    ) -> Refusal:
        """Count and record a call without an answer; the refusal to give."""
        message = f"call {call_id}: {error}"
        live.counts["engine_errors"] += 1
        live.last_error = message
        batch = self._unanswered(FAILED_CALL_NAME, path, message, started_ns)
        await self.journal(path, live, batch, f"{call_id}-failed")
        live.unanswered_ns = time.time_ns()
        await self._note(path, {UNANSWERED_CALL: message})
        return Refusal(503, message, code="engine_error", kind="server_error")

    async def refused(self, path: CallPath, live: Live, refusal: Refusal) -> None:
        """Count a call that a policy refused. The first of each code is recorded: an agent may ask for ever."""
        live.counts["refused_calls"] += 1
        if refusal.code in live.refused:
            return
        live.refused.add(refusal.code)
        message = f"{refusal.code}: {refusal.message}"
        batch = self._unanswered(REFUSED_CALL_NAME, path, message, time.time_ns())
        await self.journal(path, live, batch, f"{path.attempt_id}-refused-{refusal.code}")

    @staticmethod
    def _unanswered(name: str, path: CallPath, message: str, started_ns: int) -> Any:
        return unanswered_span(
            name,
            path=path,
            message=message,
            start_ns=started_ns,
            end_ns=time.time_ns(),
        )

    async def answered(self, path: CallPath, live: Live, started_ns: int) -> None:
        """A call that began at `started_ns` has its answer. An attempt that ends on an unanswered call ends `engine_error`, also when its
        agent swallowed the error; a call that was made after the failure shows that it went on from there, one beside it does not."""
        if live.unanswered_ns is not None and started_ns > live.unanswered_ns:
            live.unanswered_ns = None
            await self._note(path, {})

    async def _note(self, path: CallPath, metadata: dict[str, Any]) -> None:
        await self._ask(
            self._store.update_attempt(path.rollout_id, path.attempt_id, metadata=metadata),
            f"the note of an unanswered call of {path}",
        )

    async def state(self, path: CallPath) -> dict[str, Any]:
        """What a runner asks at the end of an attempt: the counts of `record.counters`, the last engine error, disconnects, open calls. It answers for an attempt that has ended or was never heard of here, too."""
        live = self._live.get((path.rollout_id, path.attempt_id))
        if live is None:
            try:
                rows = await self._ask(
                    self._store.query_span_rows(path.rollout_id, path.attempt_id),
                    f"the spans of {path}",
                )
            except NotFound as error:
                raise Refusal(404, f"{path}: {error}", code="rollout_not_found") from error
            return {**counters(rows), "last_engine_error": None, "disconnects": 0, "open_calls": 0}
        return {
            **live.counts,
            "last_engine_error": live.last_error,
            "disconnects": live.disconnects,
            "open_calls": live.open_calls,
        }


def _check_live(path: CallPath, attempt: Attempt | None) -> None:
    """Refusal unless the path's attempt is the one that is running."""
    if attempt is None or attempt.attempt_id != path.attempt_id:
        live = "none" if attempt is None else attempt.attempt_id
        raise Refusal(
            409,
            f"attempt {path.attempt_id} is not the live one of rollout {path.rollout_id} (that is {live})",
            code="attempt_not_live",
        )
    if attempt.status.final:
        reason = attempt.end_reason or attempt.status
        raise Refusal(
            410, f"{path} has ended ({reason}): its calls are refused", code="attempt_ended"
        )
