"""Model calls say inside of which span they were made: the header `traceparent`, for the gateway, which makes the call its child.

After `follow_clients()` the clients of httpx and of its successor httpx2 (OpenAI's, Anthropic's and most frameworks' calls) send it with calls of the
rollout that is here, to its own endpoint and nowhere else. A call that has the header already, from an instrumented client, keeps it. Clients of
other libraries (aiohttp, requests) send it where OpenTelemetry's instrumentor for them is on.

Who calls it: `follow`. Test alone: tests/unit/test_tracing_clients.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from agl_ray.tracing.recorder import recorder_here

LIBRARIES = ("httpx", "httpx2")
HEADER = "traceparent"


def follow_clients() -> None:
    """Have these clients send the header; calling it again changes nothing."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            continue
        library = importlib.import_module(name)
        for kind in (library.Client, library.AsyncClient):
            if not hasattr(kind.send, "agl_ray"):
                kind.send = _telling(kind.send)


def _telling(send: Any) -> Any:
    """`send` for a plain client or one that gives a coroutine: the header is set before either."""

    @functools.wraps(send)
    def send_telling(client: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        _tell(request)
        return send(client, request, *args, **kwargs)

    send_telling.agl_ray = True  # type: ignore[attr-defined]
    return send_telling


def _tell(request: Any) -> None:
    recorder = recorder_here()
    if recorder is None or HEADER in request.headers:
        return
    own = f"/rollout/{recorder.rollout_id}/attempt/{recorder.attempt_id}/"
    above, parent_id = recorder.parent()
    if parent_id is not None and own in request.url.path:
        request.headers[HEADER] = f"00-{above.trace_id:032x}-{parent_id}-01"
