"""Scheduling: which row, which slot, when. Pure asyncio."""

from agl_ray.schedule.rows import RowOrder
from agl_ray.schedule.window import SlotState, WindowedQueue

__all__ = ["RowOrder", "SlotState", "WindowedQueue"]
