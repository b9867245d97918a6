"""The windowed queue: slots that bound every sample's staleness.

Slots are numbered 0, 1, 2 ...; batch b is slots [b*P, (b+1)*P), P groups per batch, and training on batch b turns weight
version b into b+1. A slot may start only when

    version >= b - S            (b = slot // P, S = the staleness bound)

so a sample that starts under version v and is trained in batch b has age b - v <= S: the bound holds for every sample,
by construction and not on average. Batches are taken in slot order, therefore no finished group waits for ever behind a
faster one. A group that fails keeps its slot and is tried again with another row: it then starts under a newer version,
so its age only shrinks. S = 0 is synchronous training: the next batch's slots open when the weights are in the engines.

    P = 2, S = 1:   version 0 opens slots 0..3 (batches 0, 1); version 1 opens 4, 5 (batch 2); ...

Pure asyncio, one event loop, no Ray. Called by the controller; `tests/property/test_schedule_window.py` drives it alone.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import Generic, TypeVar

G = TypeVar("G")


class SlotState(StrEnum):
    """Life of a slot: not yet handed out; its group is being rolled out; its group is finished."""

    WAITING = "waiting"
    INFLIGHT = "inflight"
    FINALIZED = "finalized"


class WindowedQueue(Generic[G]):
    """Slots for groups of rollouts with bounded staleness (the module's text says how).

    groups_per_batch: P, > 0. staleness: S, >= 0. first_batch: the batch that training (re)starts with, which is also the
    weight version at the start. num_batches: batches in the whole run; no slot beyond them is handed out.
    """

    def __init__(
        self, *, groups_per_batch: int, staleness: int, num_batches: int, first_batch: int = 0
    ) -> None:
        if groups_per_batch < 1 or staleness < 0 or not 0 <= first_batch <= num_batches:
            raise ValueError(
                "WindowedQueue: expected groups_per_batch >= 1, staleness >= 0, 0 <= first_batch <= num_batches, got "
                f"{groups_per_batch=}, {staleness=}, {first_batch=}, {num_batches=}"
            )
        self.groups_per_batch, self.staleness = groups_per_batch, staleness
        self.version = first_batch
        self._next_slot = first_batch * groups_per_batch
        self._end_slot = num_batches * groups_per_batch
        self._next_batch = first_batch
        self._inflight: set[int] = set()
        self._finished: dict[int, G] = {}
        self._changed = asyncio.Condition()

    def state(self, slot: int) -> SlotState:
        if slot in self._inflight:
            return SlotState.INFLIGHT
        return SlotState.WAITING if slot >= self._next_slot else SlotState.FINALIZED

    def may_start(self, slot: int) -> bool:
        """Whether `slot` may start under the current version."""
        return slot < self._end_slot and (
            self.version >= slot // self.groups_per_batch - self.staleness
        )

    async def start_slot(self) -> int | None:
        """The next slot, as soon as the window allows it; None when the run has no more slots."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._next_slot >= self._end_slot or self.may_start(self._next_slot)
            )
            if self._next_slot >= self._end_slot:
                return None
            slot = self._next_slot
            self._next_slot += 1
            self._inflight.add(slot)
            return slot

    async def finish(self, slot: int, group: G) -> None:
        """Hand in the finished group of a slot; ValueError for a slot that is not in flight."""
        async with self._changed:
            if slot not in self._inflight:
                raise ValueError(f"slot {slot}: expected it in flight, got {self.state(slot)}")
            self._inflight.remove(slot)
            self._finished[slot] = group
            self._changed.notify_all()

    async def next_batch(self) -> list[G]:
        """The groups of the next batch in slot order, as soon as all of them are finished."""
        first = self._next_batch * self.groups_per_batch
        slots = range(first, first + self.groups_per_batch)
        async with self._changed:
            await self._changed.wait_for(lambda: all(slot in self._finished for slot in slots))
            self._next_batch += 1
            return [self._finished.pop(slot) for slot in slots]

    async def advance(self, version: int) -> None:
        """A new weight version is in the engines: opens slots. ValueError when it goes backwards."""
        async with self._changed:
            if version < self.version:
                raise ValueError(f"version {version}: expected at least {self.version}")
            self.version = version
            self._changed.notify_all()
