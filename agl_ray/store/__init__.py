"""LightningStore: state machine, journals, queries, and the client that everybody uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agl_ray.store.client import LightningStore
    from agl_ray.store.core import StoreCore

__all__ = ["LightningStore", "StoreCore"]


def __getattr__(name: str) -> object:
    if name == "LightningStore":
        from agl_ray.store.client import LightningStore

        return LightningStore
    if name == "StoreCore":
        from agl_ray.store.core import StoreCore

        return StoreCore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
