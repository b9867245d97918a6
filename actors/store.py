"""The store's process: one named, restartable actor over `agl_ray.store.core`.

Lives in the run's namespace under the name `store`. It restarts for ever; each life takes up what is open in the journal, so nobody else
notices more than a pause. Where the journal cannot be opened or written, every call answers with that StoreError, and the
actor tries to open it again on a later call.
Who calls it: `agl_ray.trainer` through `create_store`; everybody else through `LightningStore.connect`. Test alone:
tests/integration/test_store_actor.py, tests/faults/test_store_kill.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from typing import Any

from agl_ray.config.models import StoreConfig
from agl_ray.config.store_address import masked
from agl_ray.store.client import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.store.doors import wire
from agl_ray.store.doors.messages import answer_message
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.lane import Command, answer_each
from agl_ray.store.link import Address, LinkDoor
from agl_ray.store.transport import ActorTransport
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")

MAX_CONCURRENCY = 10_000  # every blocked dequeue and wait of a run holds one place
RETRY_SECONDS = 2.0  # between two tries to open a journal that failed


class Store:
    """The actor class; `create_store` makes the actor. Its constructor never fails: errors are answers."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url = url
        self._options = options
        self._core: StoreCore | None = None
        self._closed = False
        self._opening = asyncio.Lock()
        self._failure: StoreError | None = None
        self._tried_at = 0.0
        self._restarted = _restarted()
        self._door = LinkDoor(self.message)

    async def call(self, command: str, *arguments: Any) -> Any:
        """Run one command of `StoreCore` by name."""
        if command == "close":
            return await self.shutdown()
        core = self._core
        if core is None or core.failure is not None:
            core = await self._open()
        return await getattr(core, command)(*arguments)

    async def message(self, body: bytes) -> bytes:
        """Run the commands of a message (`agl_ray.store.doors.messages`), begun in their order."""
        try:
            return await answer_message(self._run, body)
        except Exception as error:  # nobody may wait for an answer that does not come
            log.exception("store: a message could not be answered")
            return wire.encode_error(error)

    async def _run(self, commands: list[Command], _seconds: float) -> list[Any]:
        return await answer_each(self.call, commands)

    async def link(self) -> Address | None:
        """Where this process takes messages without Ray's part in it; None where it cannot listen."""
        import ray

        try:
            return await self._door.open(ray.util.get_node_ip_address())
        except OSError as error:
            log.warning("store: commands travel in calls of its actor, which is slower: %s", error)
            return None

    async def pid(self) -> int:
        """The process id of this life (fault tests kill it)."""
        return os.getpid()

    async def shutdown(self) -> None:
        """Flush and close the journal; the process is then ready to be killed."""
        self._closed = True
        if self._core is not None and self._core.failure is None:
            await self._core.close()

    async def _open(self) -> StoreCore:
        async with self._opening:
            if self._closed:
                raise StoreError(f"store {masked(self._url)}: it was shut down")
            if self._core is not None and self._core.failure is None:
                return self._core
            if self._failure is not None and time.monotonic() < self._tried_at + RETRY_SECONDS:
                raise StoreError(str(self._failure))
            if self._core is not None:
                self._failure = self._core.failure
                await self._core.close()
            self._core = None
            self._tried_at = time.monotonic()
            try:
                self._core = await StoreCore.open(
                    self._url, must_exist=self._restarted, **self._options
                )
            except StoreError as error:
                self._failure = error
                raise
            self._restarted, self._failure = True, None
            return self._core


def _restarted() -> bool:
    """Whether this process is a later life of the actor."""
    import ray

    if not ray.is_initialized():
        return False
    with warnings.catch_warnings():  # Ray's own property asks Ray's deprecated one
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def journal_settings(config: StoreConfig, run_id: str) -> JournalSettings:
    """How the journal of run `run_id` keeps its data; the pool's settings that are not given are taken from the environment."""
    given: dict[str, Any] = {
        "run_id": config.run_id or run_id,
        "mongodb_database": config.mongodb_database,
    }
    return JournalSettings.from_environment(
        pool=config.pool.model_dump(),
        payload=config.payload,
        encryption=config.encryption,
        **{name: value for name, value in given.items() if value is not None},
    )


def create_store(
    name: str,
    namespace: str,
    url: str,
    *,
    lease_seconds: float = 30.0,
    memory_mib: float = 256.0,
    cache_mib: float = 256.0,
    settings: JournalSettings | None = None,
    start_seconds: float = 60.0,
    detached: bool = False,
    actor_options: dict[str, Any] | None = None,
) -> LightningStore:
    """Create the store actor and wait until its journal is open.

    url: `sqlite:///path`, `postgresql://...`, `mongodb://...` or `memory://`; settings: how the journal keeps the data. memory_mib,
    cache_mib: of records and of span payloads in the actor's memory. detached: it outlives the job that made it. actor_options: further options for Ray;
    by default the actor takes no CPU and stays on the caller's node, where its file is. Raises StoreError (the journal cannot be
    opened, the name is taken) and WaitTimeout.
    """
    import ray

    from agl_ray import waits

    options: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": MAX_CONCURRENCY,
        "scheduling_strategy": _stay_here(),
    }
    if detached:
        options["lifetime"] = "detached"
    options |= actor_options or {}
    try:
        handle = (
            ray.remote(Store)
            .options(**options)
            .remote(
                url,
                lease_seconds=lease_seconds,
                memory_mib=memory_mib,
                cache_mib=cache_mib,
                settings=settings,
            )
        )
    except ValueError as error:
        raise StoreError(f"store actor {name!r} in namespace {namespace!r}: {error}") from error
    try:
        waits.get(handle.call.remote("ping"), on=f"store {name!r} to start", seconds=start_seconds)
    except BaseException as error:
        ray.kill(handle, no_restart=True)
        cause = getattr(error, "cause", None)
        if isinstance(cause, StoreError):
            raise cause from None
        raise
    return LightningStore(ActorTransport(handle, name, namespace))


def _stay_here() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
