"""StoreAway: no answer came from the store, because its process restarts. Raised by every transport, understood by the client."""

from __future__ import annotations


class StoreAway(Exception):
    """The store's process died or restarts; whether the command was carried out is not known."""
