"""All doors of a store as one ASGI application.

    /v1/agl/call/{command}, /v1/agl/calls   our own client (rpc.py)
    /v1/agl/...                             REST (rest.py)
    /v1/traces                              OpenTelemetry (otlp.py)
    /api/..., /proxy/..., /healthz          the facade of agent-lightning 1.0 (facade.py)

What it is: the way from a path to its door, and the API key. The paths are whole (`/v1/...`) wherever the application is mounted.
Who calls it: `actors/store_door.py` (Ray Serve), `agl_ray/cli/store_serve.py` (uvicorn). Test alone: tests/unit/test_store_http.py.
"""

from __future__ import annotations

import asyncio
import hmac
import logging

from agl_ray.ops.asgi import (
    MAX_BODY,
    App,
    Message,
    Receive,
    Scope,
    Send,
    respond,
)
from agl_ray.store.client import LightningStore
from agl_ray.store.doors import rpc
from agl_ray.store.doors.errors import error_body
from agl_ray.store.doors.facade import facade_app
from agl_ray.store.doors.otlp import otlp_app
from agl_ray.store.doors.rest import rest_app
from agl_ray.store.transport import GatheringTransport

log = logging.getLogger("agl_ray.store")

OPEN_PATHS = frozenset({"/v1/agl/health", "/healthz"})  # answered without a key: probes have none
OTLP_PATHS = ("/v1/traces", "/v1/metrics", "/v1/logs", "/v1/development/")
FACADE_PATHS = ("/api/", "/proxy/", "/healthz")


def store_app(
    store: LightningStore,
    *,
    api_key: str | None = None,
    gateway_url: str | None = None,
    max_body: int = MAX_BODY,
) -> App:
    """The doors of `store`. api_key: what callers must show as `Authorization: Bearer KEY` or `x-api-key: KEY`; None: nothing.
    gateway_url: where the facade sends model calls. max_body: bytes of one request."""
    transport = store.transport
    if not isinstance(transport, GatheringTransport):
        raise TypeError(f"{type(transport).__name__}: expected a transport with call_many")
    calls = rpc.CallRoute(transport, max_body)
    otlp = otlp_app(store, max_bytes=max_body)
    facade = facade_app(store, gateway_url)
    doors: list[tuple[str, App]] = [(rpc.ONE, calls), (rpc.MANY, calls)]
    doors.append(("/v1/agl/", rest_app(store, keyed=api_key is not None, max_body=max_body)))
    doors += [(path, otlp) for path in OTLP_PATHS]
    doors += [(path, facade) for path in FACADE_PATHS]
    return _Doors(doors, api_key)


class _Doors:
    """`doors`: (start of the path, application), the first that fits is asked."""

    def __init__(self, doors: list[tuple[str, App]], api_key: str | None) -> None:
        self._doors = doors
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._route(_with_whole_path(scope), receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path not in OPEN_PATHS and not self._may_enter(scope):
            text = "expected the store's API key as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            await respond(send, 401, error_body("Unauthorized", text))
            return
        if self._key is None and _of_another_site(scope):
            text = "a web page of another site may not use a store that has no API key"
            await respond(send, 403, error_body("Forbidden", text))
            return
        for start, app in self._doors:
            if path.startswith(start):
                await _answered(app, scope, receive, send)
                return
        await respond(send, 404, error_body("NotFound", f"{path}: nothing is there"))

    def _may_enter(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        headers = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        shown = [headers.get(b"x-api-key", b"")]
        if scheme.lower() == b"bearer":
            shown.append(token.strip())
        fits = [hmac.compare_digest(one, self._key) for one in shown]
        return any(fits)


def _of_another_site(scope: Scope) -> bool:
    """Browsers tell which page sends a request; other programs say nothing."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


async def _answered(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`; where the server ends meanwhile and cancels it, the caller is told to ask again."""
    started = False

    async def note(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        await app(scope, receive, note)
    except asyncio.CancelledError:
        if not started:
            await respond(send, 503, error_body("StoreAway", "the store is being ended"))
        raise


def _with_whole_path(scope: Scope) -> Scope:
    """`scope` with the whole path and no root: where the application is mounted below a prefix, servers differ in what they cut off."""
    root, path = scope.get("root_path", ""), scope["path"]
    whole = path if not root or path.startswith(root) else root + path
    return {**scope, "root_path": "", "path": whole}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
