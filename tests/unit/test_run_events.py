"""RunEvents: order, cursor, long poll, notices in the books."""

from __future__ import annotations

import asyncio

from actors.run_events import RunEvents
from agl_ray.ops.events import Notice, Progress
from agl_ray.ops.ledger import Ledger


def test_events_come_in_order_from_the_cursor_on() -> None:
    async def main() -> None:
        said = RunEvents(lambda notice: None)
        for i in range(3):
            await said.tell(Progress(name="rollouts", done=i, total=3))
        assert [event.done for event in await said.since(1, 0.0)] == [1, 2]  # type: ignore[union-attr]
        assert await said.since(3, 0.01) == []

    asyncio.run(main())


def test_a_waiting_reader_is_woken_by_an_event_from_a_callback() -> None:
    async def main() -> None:
        said = RunEvents(lambda notice: None)
        reader = asyncio.ensure_future(said.since(0, 30.0))
        await asyncio.sleep(0)
        said.tell_soon(Notice(text="late"))
        assert await asyncio.wait_for(reader, 60) == [Notice(text="late")]

    asyncio.run(main())


def test_notices_are_counted_in_the_ledger_by_what_was_replaced() -> None:
    async def main() -> None:
        ledger = Ledger()
        said = RunEvents(lambda notice: ledger.note(notice.text, notice.restarted))
        await said.notice("runner-0 died", "runner")
        await said.notice("runner-1 died", "runner")
        await said.notice("something else")
        assert ledger.restarts == {"runner": 2}
        assert ledger.notices == ["runner-0 died", "runner-1 died", "something else"]

    asyncio.run(main())
