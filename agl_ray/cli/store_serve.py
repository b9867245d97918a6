"""`agl-ray store serve`: a store outside any run, behind its HTTP doors, in this process.

What it is: uvicorn over a store that is opened here. SIGTERM and Ctrl-C end it in order: calls in flight get a moment, the journal is
flushed and closed. When the journal fails while it runs, calls are answered with that error and later ones open it again.
Who calls it: `agl_ray.cli.store`. Test alone: tests/integration/test_store_serve.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from typing import Any

from agl_ray.config.store_address import masked
from agl_ray.types import InputError, StoreError

DRAIN_SECONDS = 2  # for calls in flight at the end; whoever waits longer asks again
KEEP_ALIVE_SECONDS = 75  # idle connections; longer than our client keeps them
BACKLOG = 2048  # connections that wait to be accepted
OPEN_SECONDS = 120.0  # to open the journal


def serve(
    url: str,
    host: str = "127.0.0.1",
    port: int = 4747,
    api_key: str | None = None,
    open: bool = False,
    **options: Any,
) -> None:
    """Serve the journal at `url` at http://host:port until a signal comes; port 0: a free one, which is printed.

    api_key: what callers must show. Without one only this machine can be served, unless `open` says that everybody may enter.
    options: those of `StoreCore.open`. InputError: the address is taken or not of this machine, the journal cannot be opened.
    """
    check_entry(host, api_key, open)
    with _listen(host, port) as door:
        asyncio.run(_serve(url, door, api_key, options))


def check_entry(host: str, api_key: str | None, open: bool) -> None:
    """InputError where the store would be open to other machines without anybody having said so."""
    if api_key == "":
        raise InputError("store serve --api-key: expected a key, got an empty one")
    if api_key is None and not open and not _is_here(host):
        raise InputError(
            f"store serve --host {host}: other machines could read and change this store; "
            "give it an --api-key, or say --open if everybody may"
        )


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """InputError where the address is taken or not of this machine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return listening(family, kind, (address[0], port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"store serve: cannot listen at {host}:{port} ({reason}); choose another --port (0: a free one) or --host"
        ) from error


def listening(
    family: int = socket.AF_INET,
    kind: int = socket.SOCK_STREAM,
    address: tuple[Any, ...] = ("127.0.0.1", 0),
) -> socket.socket:
    """A listening socket. Its protocol is named: only then does asyncio answer without waiting for more to send (40 ms a call)."""
    door = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen(BACKLOG)
    except BaseException:
        door.close()
        raise
    return door


async def _serve(
    url: str, door: socket.socket, api_key: str | None, options: dict[str, Any]
) -> None:
    import uvicorn

    from actors.store import Store
    from agl_ray.store import LightningStore
    from agl_ray.store.doors.app import store_app
    from agl_ray.store.doors.own_transport import OwnTransport
    from agl_ray.waits import wait

    store = Store(url, **options)
    transport = OwnTransport(store.call)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn obeys these while it serves, and raises them again when it has stopped: then the journal is to be closed first.
        asyncio.get_running_loop().add_signal_handler(number, transport.leave)
    try:
        await wait(store.call("ping"), on=f"the journal of {masked(url)}", seconds=OPEN_SECONDS)
    except StoreError as error:
        raise InputError(str(error)) from error
    try:
        # A store of one's own is never away but at its end: nothing is repeated then.
        app = store_app(LightningStore(transport, away_seconds=0.0), api_key=api_key)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        host, port = door.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        key = "with an API key" if api_key else "without an API key"
        print(f"store {masked(url)} at http://{address}, {key}; Ctrl-C ends it", flush=True)
        await uvicorn.Server(config).serve(sockets=[door])
    finally:
        await store.shutdown()
    print("store closed, its journal is flushed", flush=True)
