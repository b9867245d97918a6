"""From a recorder to the store: batches while the attempt runs, the rest with its end.

A batch that the store refuses is counted as lost with the recorder; the end of the attempt then says so.
Who calls it: the runner, one per attempt. Test alone: tests/unit/test_tracing_sender.py.
"""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

from agl_ray.spans import span_batch
from agl_ray.tracing.recorder import MANY, SpanRecorder
from agl_ray.types import AglError

if TYPE_CHECKING:  # emitters must stay light
    import pyarrow as pa

    from agl_ray.store import LightningStore


class SpanSender:
    """Sends what `recorder` holds whenever much of it waits. Made on the event loop that the store is called from."""

    def __init__(self, store: LightningStore, recorder: SpanRecorder) -> None:
        self._store, self._recorder = store, recorder
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # what sends is not the agent's that recorded
        self._asked = False
        self._task: asyncio.Task[None] | None = None
        self._batches = 0
        recorder.on_many = self._ask

    def _ask(self) -> None:
        """From any thread."""
        if not self._asked:
            self._asked = True
            self._loop.call_soon_threadsafe(self._begin, context=self._context)

    def _begin(self) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._send_much())

    async def _send_much(self) -> None:
        self._asked = False
        while self._recorder.waiting >= MANY:
            rows = self._recorder.take()
            try:
                await self._send(rows)
            except AglError as error:
                self._recorder.lose(f"{type(error).__name__}: {error}", len(rows))
        self._asked = False

    async def _send(self, rows: list[dict[str, Any]]) -> None:
        key = self._recorder.rollout_id, self._recorder.attempt_id
        await self._store.add_spans(*key, span_batch(rows), batch_id=self._next_id())

    def _next_id(self) -> str:
        self._batches += 1
        return f"{self._recorder.attempt_id}-{self._batches}"

    async def close(self) -> tuple[pa.RecordBatch | None, str]:
        """End the recording. What is left, and its batch id, for `LightningStore.end_attempt`: the last spans travel with the end."""
        rows = self._recorder.close()
        if self._task is not None:
            await self._task
        return span_batch(rows) if rows else None, self._next_id()
