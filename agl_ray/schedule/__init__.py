"""Scheduling: which row, which slot, when, and what becomes of a group without signal. Pure asyncio."""

from agl_ray.schedule.refill import Fate, Refill
from agl_ray.schedule.rows import RowOrder, RowPositions
from agl_ray.schedule.window import SlotState, WindowedQueue

__all__ = ["Fate", "Refill", "RowOrder", "RowPositions", "SlotState", "WindowedQueue"]
