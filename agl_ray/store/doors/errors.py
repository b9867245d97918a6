"""The store's errors over HTTP: their statuses, and the one JSON body.

Who calls it: the doors. Test alone: tests/unit/test_store_http.py.
"""

from __future__ import annotations

import msgspec

from agl_ray.ops.asgi import TooLarge
from agl_ray.store.transport import StoreAway
from agl_ray.types import Conflict, InputError, NotFound, StoreError, WaitTimeout


def status_of(error: BaseException) -> int:
    """The HTTP status that says what kind of error this is."""
    table: tuple[tuple[type[BaseException], int], ...] = (
        (TooLarge, 413),
        (InputError, 400),
        (NotFound, 404),
        (Conflict, 409),
        (WaitTimeout, 504),
        (StoreError, 503),
        (StoreAway, 503),
    )
    return next((status for kind, status in table if isinstance(error, kind)), 500)


def error_body(kind: str, message: str) -> bytes:
    """The one JSON error body of all doors but the call route's."""
    text = message.encode("utf-8", "backslashreplace").decode()
    return msgspec.json.encode({"error": {"type": kind, "message": text}})
