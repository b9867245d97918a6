"""REST for other languages: agent-lightning 0.3's paths under /v1/agl, JSON, long polls, pages with cursors.

What it is: a handler per route over a LightningStore. Beside 0.3's routes: `rollouts/cancel`, `attempts/{id}/end`, `wait_seconds` of
`dequeue`, many spans in one request. The document is at /v1/agl/openapi.json.
Who calls it: `agl_ray.store.doors.app`. Test alone: tests/integration/test_store_rest.py.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.ops.asgi import MAX_BODY, App
from agl_ray.store.client import LightningStore
from agl_ray.store.doors import rest_records as records
from agl_ray.store.doors.rest_pages import fields_of, keyed, paged
from agl_ray.store.doors.rest_routes import Routes
from agl_ray.types import (
    Attempt,
    EventPage,
    NotFound,
    ResourcesUpdate,
    Rollout,
    Span,
    Worker,
)


def rest_app(store: LightningStore, *, keyed: bool = False, max_body: int = MAX_BODY) -> App:
    """The ASGI application; `keyed`: a key is asked for in front of it, which the document tells. max_body: bytes of a request."""
    from agl_ray import __version__

    routes = Routes("agl_ray store", __version__, keyed=keyed, max_body=max_body)
    Rollouts(store).add_to(routes)
    Attempts(store).add_to(routes)
    Others(store).add_to(routes)
    Spans(store).add_to(routes)
    return routes.app


class Rollouts:
    def __init__(self, store: LightningStore) -> None:
        self._store = store

    def add_to(self, routes: Routes) -> None:
        one: Any = records.RolloutWithAttempt
        page = records.RolloutPage
        search = records.SearchRollouts
        add = routes.add
        add(
            "POST",
            "queues/rollouts/enqueue",
            self.enqueue_rollouts,
            takes=records.Enqueue,
            gives=list[Rollout],
            status=201,
        )
        add(
            "POST",
            "queues/rollouts/dequeue",
            self.dequeue_rollouts,
            takes=records.Dequeue,
            gives=list[one],
            waits=True,
        )
        add("GET", "rollouts", self.list_rollouts, query=search, gives=page)
        add("POST", "rollouts/search", self.search_rollouts, takes=search, gives=page)
        add(
            "POST",
            "rollouts/cancel",
            self.cancel_rollouts,
            takes=records.CancelRollouts,
            gives=list[Rollout],
        )
        add(
            "POST",
            "rollouts",
            self.start_rollout,
            takes=records.StartRollout,
            gives=one,
            status=201,
        )
        add("GET", "rollouts/{rollout_id}", self.get_rollout, gives=one)
        add(
            "POST",
            "rollouts/{rollout_id}",
            self.update_rollout,
            takes=records.UpdateRollout,
            gives=Rollout,
        )
        add(
            "POST",
            "waits/rollouts",
            self.wait_for_rollouts,
            takes=records.WaitForRollouts,
            gives=list[Rollout],
            waits=True,
        )

    async def enqueue_rollouts(self, body: records.Enqueue) -> Any:
        """Queue rollouts, in order: all of them or none."""
        return await self._store.enqueue_many_rollouts([one.request() for one in body.rollouts])

    async def dequeue_rollouts(self, body: records.Dequeue) -> Any:
        """Take the oldest waiting rollouts and lease an attempt of each; an empty list where there is none in time.

        A repeated `request_id` is answered with what it took, as that is now, while one of its attempts is open (and, of the newest 10,000
        requests, until the store restarts); one that took nothing looks again."""
        taken = await self._store.dequeue_many_rollouts(**fields_of(body))
        return [records.with_attempt(one) for one in taken]

    async def list_rollouts(self, query: records.SearchRollouts) -> Any:
        """Rollouts with their latest attempt, in order of creation unless `sort_by` says otherwise."""
        return await self.search_rollouts(query)

    async def search_rollouts(self, body: records.SearchRollouts) -> Any:
        """As the list, for filters that are too long for a URL."""
        return await keyed(body, self._store.query_rollouts, "rollout_id", records.with_attempt)

    async def cancel_rollouts(self, body: records.CancelRollouts) -> Any:
        """Cancel; open attempts end `cancelled`, final rollouts stay as they are."""
        return await self._store.cancel_rollouts(body.rollout_ids)

    async def start_rollout(self, body: records.StartRollout) -> Any:
        """Make a rollout and its first attempt at once, past the queue; a repeated `request_id` gives the same ones."""
        return records.with_attempt(await self._store.start_rollout(**fields_of(body)))

    async def get_rollout(self, rollout_id: str) -> Any:
        """The rollout with its latest attempt."""
        found = await self._store.get_rollout_in_full(rollout_id)
        if found is None:
            raise NotFound(f"rollout {rollout_id!r}: not in the store")
        rollout, attempt, _ = found
        return records.RolloutWithAttempt(**msgspec.structs.asdict(rollout), attempt=attempt)

    async def update_rollout(self, rollout_id: str, body: records.UpdateRollout) -> Any:
        """Change the given fields. `queuing` or `requeuing` revives a final rollout; other states are final."""
        return await self._store.update_rollout(rollout_id, **fields_of(body))

    async def wait_for_rollouts(self, body: records.WaitForRollouts) -> Any:
        """Those that are final, as soon as all (or `min_count`) are, or at the timeout. Unknown ids are left out."""
        return await self._store.wait_for_rollouts(**fields_of(body))


class Attempts:
    def __init__(self, store: LightningStore) -> None:
        self._store = store

    def add_to(self, routes: Routes) -> None:
        at, search = "rollouts/{rollout_id}/attempts", records.SearchAttempts
        add = routes.add
        add("GET", at, self.list_attempts, query=search, gives=records.AttemptPage)
        add("POST", f"{at}/search", self.search_attempts, takes=search, gives=records.AttemptPage)
        add(
            "POST",
            at,
            self.start_attempt,
            takes=records.StartAttempt,
            gives=records.RolloutWithAttempt,
            status=201,
        )
        add("GET", f"{at}/latest", self.get_latest_attempt, gives=Attempt)
        add("GET", f"{at}/{{attempt_id}}", self.get_attempt, gives=Attempt)
        add(
            "POST",
            f"{at}/{{attempt_id}}",
            self.update_attempt,
            takes=records.UpdateAttempt,
            gives=Attempt,
        )
        add(
            "POST",
            f"{at}/{{attempt_id}}/end",
            self.end_attempt,
            takes=records.EndAttempt,
            gives=Attempt,
        )

    async def list_attempts(self, rollout_id: str, query: records.SearchAttempts) -> Any:
        """The attempts of a rollout; none where it is unknown."""
        return await self.search_attempts(rollout_id, query)

    async def search_attempts(self, rollout_id: str, body: records.SearchAttempts) -> Any:
        """As the list."""
        return await paged(body, self._store.query_attempts, None, rollout_id)

    async def start_attempt(self, rollout_id: str, body: records.StartAttempt) -> Any:
        """A new attempt by hand, past the queue and past `max_attempts`; a repeated `request_id` gives the same one."""
        return records.with_attempt(await self._store.start_attempt(rollout_id, **fields_of(body)))

    async def get_latest_attempt(self, rollout_id: str) -> Any:
        """The attempt that moves its rollout."""
        return await self._store.get_attempt(rollout_id, "latest")

    async def get_attempt(self, rollout_id: str, attempt_id: str) -> Any:
        """One attempt."""
        return await self._store.get_attempt(rollout_id, attempt_id)

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, body: records.UpdateAttempt
    ) -> Any:
        """Change the given fields (`latest` is a name, too); a final status ends the attempt."""
        return await self._store.update_attempt(rollout_id, attempt_id, **fields_of(body))

    async def end_attempt(self, rollout_id: str, attempt_id: str, body: records.EndAttempt) -> Any:
        """End an attempt with a reason; the same end again changes nothing."""
        return await self._store.end_attempt(rollout_id, attempt_id, **fields_of(body))


class Others:
    """Workers, resources, the store itself."""

    def __init__(self, store: LightningStore) -> None:
        self._store = store

    def add_to(self, routes: Routes) -> None:
        add = routes.add
        add("GET", "health", self.health, gives=records.Health)
        add("GET", "statistics", self.statistics, gives=dict[str, Any])
        add("GET", "events", self.events, query=records.Events, gives=EventPage, waits=True)
        search: Any = records.SearchWorkers
        add("GET", "workers", self.list_workers, query=search, gives=records.WorkerPage)
        add("POST", "workers/search", self.search_workers, takes=search, gives=records.WorkerPage)
        add("GET", "workers/{worker_id}", self.get_worker, gives=Worker)
        add(
            "POST",
            "workers/{worker_id}",
            self.update_worker,
            takes=records.UpdateWorker,
            gives=Worker,
        )
        search, page, update = records.SearchResources, records.ResourcesPage, ResourcesUpdate
        given = records.Resources
        add("GET", "resources", self.list_resources, query=search, gives=page)
        add("POST", "resources/search", self.search_resources, takes=search, gives=page)
        add("POST", "resources", self.add_resources, takes=given, gives=update, status=201)
        add("GET", "resources/latest", self.get_latest_resources, gives=update)
        add("GET", "resources/{resources_id}", self.get_resources, gives=update)
        add("POST", "resources/{resources_id}", self.update_resources, takes=given, gives=update)

    async def health(self) -> Any:
        """Whether the store answers; asks for no key."""
        return records.Health("ok", await self._store.ping())

    async def statistics(self) -> Any:
        """Counts of records by status and by end reason, spans and their bytes, queue length, uptime, restarts."""
        return await self._store.statistics()

    async def events(self, query: records.Events) -> Any:
        """Changes of state behind a cursor; `next` of the answer is the cursor of the next call (a long poll with `wait_seconds`)."""
        given = fields_of(query)
        return await self._store.read_events(given.pop("after"), **given)

    async def list_workers(self, query: records.SearchWorkers) -> Any:
        """Workers, by id unless `sort_by` says otherwise."""
        return await self.search_workers(query)

    async def search_workers(self, body: records.SearchWorkers) -> Any:
        """As the list."""
        return await paged(body, self._store.query_workers)

    async def get_worker(self, worker_id: str) -> Any:
        """One worker."""
        return _found("worker", worker_id, await self._store.get_worker_by_id(worker_id))

    async def update_worker(self, worker_id: str, body: records.UpdateWorker) -> Any:
        """A heartbeat; makes the worker known, renews the leases of `attempts`."""
        return await self._store.update_worker(worker_id, **fields_of(body))

    async def list_resources(self, query: records.SearchResources) -> Any:
        """Snapshots of resources, in order of creation unless `sort_by` says otherwise."""
        return await self.search_resources(query)

    async def search_resources(self, body: records.SearchResources) -> Any:
        """As the list."""
        return await keyed(body, self._store.query_resources, "resources_id", None, "create_time")

    async def add_resources(self, body: records.Resources) -> Any:
        """Publish a new snapshot; it is the latest from now on."""
        return await self._store.add_resources(body.resources)

    async def get_latest_resources(self) -> Any:
        """The latest snapshot."""
        return _found("resources", "latest", await self._store.get_latest_resources())

    async def get_resources(self, resources_id: str) -> Any:
        """One snapshot."""
        found = await self._store.get_resources_by_id(resources_id)
        return _found("resources", resources_id, found)

    async def update_resources(self, resources_id: str, body: records.Resources) -> Any:
        """The next version of a snapshot (the first where the id is new); it becomes the latest."""
        return await self._store.update_resources(resources_id, body.resources)


class Spans:
    def __init__(self, store: LightningStore) -> None:
        self._store = store

    def add_to(self, routes: Routes) -> None:
        new: Any = records.NewSpan | list[records.NewSpan]
        given: Any = Span | list[Span] | None
        search, page = records.SearchSpans, records.SpanPage
        routes.add("POST", "spans", self.add_spans, takes=new, gives=given, status=201)
        routes.add("GET", "spans", self.list_spans, query=search, gives=page)
        routes.add("POST", "spans/search", self.search_spans, takes=search, gives=page)
        routes.add(
            "POST",
            "spans/next",
            self.next_span_sequence_id,
            takes=records.NextSequenceId,
            gives=int,
        )

    async def add_spans(self, body: records.NewSpan | list[records.NewSpan]) -> Any:
        """Store one span or many; the answer is what was stored: a known span (null, left out) is not stored twice."""
        if isinstance(body, list):
            return await self._store.add_many_spans(body)
        return await self._store.add_span(body)

    async def list_spans(self, query: records.SearchSpans) -> Any:
        """Spans of a rollout; none where it is unknown. `filter_logic` joins the filters, rollout and attempt always bind."""
        return await self.search_spans(query)

    async def search_spans(self, body: records.SearchSpans) -> Any:
        """As the list."""
        return await paged(body, self._store.query_spans)

    async def next_span_sequence_id(self, body: records.NextSequenceId) -> Any:
        """Reserve the rollout's next sequence id."""
        return await self._store.get_next_span_sequence_id(body.rollout_id, body.attempt_id)


def _found(kind: str, key: str, record: Any) -> Any:
    if record is None:
        raise NotFound(f"{kind} {key!r}: not in the store")
    return record
