"""A store behind its HTTP doors, served by uvicorn in a thread of this process, for tests."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from agl_ray.cli.store_serve import listening
from agl_ray.ops.asgi import MAX_BODY
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.app import store_app


@dataclass
class Served:
    """url: `http://127.0.0.1:port`. core: behind it, on the server's loop."""

    url: str
    core: StoreCore
    loop: asyncio.AbstractEventLoop

    def client(self, api_key: str | None = None, **options: Any) -> LightningStore:
        return LightningStore.http(self.url, api_key, **options)

    def local(self) -> LightningStore:
        return LightningStore.local(self.core)


@contextmanager
def served(
    url: str = "memory://",
    *,
    api_key: str | None = None,
    max_body: int = MAX_BODY,
    **options: Any,
) -> Iterator[Served]:
    """Serve the journal at `url` until the block ends; `options` are those of `StoreCore.open`."""
    started = threading.Event()
    box: dict[str, Any] = {}

    async def main(door: socket.socket) -> None:
        core = await StoreCore.open(url, **options)
        app = store_app(LightningStore.local(core), api_key=api_key, max_body=max_body)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        box.update(core=core, server=server, loop=asyncio.get_running_loop())
        started.set()
        await server.serve(sockets=[door])
        await core.close()

    with listening() as door:
        thread = threading.Thread(target=lambda: asyncio.run(main(door)), name="http-store")
        thread.start()
        if not started.wait(120):
            raise RuntimeError("the store did not start")
        try:
            yield Served(f"http://127.0.0.1:{door.getsockname()[1]}", box["core"], box["loop"])
        finally:
            box["server"].should_exit = True
            thread.join(120)
