"""The REST interface of agent-lightning 1.0 over our store: what was written for it runs unchanged.

    POST GET      /api/rollouts                       GET PATCH DELETE  /api/rollouts/{id}
    GET           /api/rollouts/terminal              GET               /api/rollouts/{id}/events
    POST          /api/rollouts/{id}/attempt/{attempt}/events
    POST DELETE   /api/models
    POST          /proxy/rollout/{id}/attempt/{attempt}/mode/{train|val}/openai/v1/{chat/completions|completions}
    POST          /proxy/pause, /proxy/resume         GET               /proxy/state, /healthz

An agent of 1.0 is any program; it reads three environment variables (`environment` makes them, and a runner must set them):

* `AGL_OPENAI_BASE_URL`: base URL for an OpenAI client, the proxy's path of its attempt. Every call made through it is recorded by our gateway;
* `AGL_EVENT_URL`: where it posts events; its one duty is `{"event_type": "reward", "data": {"value": NUMBER}}`;
* `AGL_KEY`: bearer key for both (`Authorization: Bearer`), never empty, since HTTP clients refuse an empty one.

Beside these a rollout may name variables of the task (`config.local.env_map`: name -> `input.path.to.field`); it is kept, and setting them is the
runner's work. Exit code 0 means succeeded; the reward is the last `reward` event (`reported_reward`).

Where it differs from 1.0: attempts have ids of their own and may be retried; "0", which 1.0's controllers hand out, names the latest one,
and begins one where the rollout still waits. A `reward` whose value is no finite number is refused (422). Calls wait while paused. Streams are
allowed. `next_after` of the terminal cursor is an opaque integer (the time of completion), so that nothing is missed when rollouts are deleted or
the server restarts; a page is longer than `limit` where many completed in one moment.
Keys are checked by `agl_ray.store.doors.app`, which mounts this. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from msgspec import UnsetType
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agl_ray.ops.asgi import App, Receive, Scope, Send, read_body
from agl_ray.spans import span_batch
from agl_ray.store.client import LightningStore
from agl_ray.store.doors import facade_events, facade_records
from agl_ray.store.doors.facade_http import (
    ModelCalls,
    answer,
    is_id,
    no_route,
    number,
    read,
    refuse,
)
from agl_ray.store.doors.facade_proxy import MODES, PATHS, Call, Pause, Proxy
from agl_ray.store.doors.facade_records import FIRST, KEPT, NEXT, STATE_OF, State
from agl_ray.store.doors.facade_terminal import Terminals
from agl_ray.store.transport import StoreAway
from agl_ray.types import (
    LLM,
    AglError,
    Attempt,
    AttemptedRollout,
    Conflict,
    EndReason,
    InputError,
    NotFound,
    Resource,
    Rollout,
    RolloutStatus,
)

MODELS_ID = "rs-agentlightning-1.0"
"""Resources id of the model endpoints that clients of 1.0 register: one LLM each, named `model@endpoint`."""

MODELS_STATE = "agentlightning-1.0/models"


class Model(msgspec.Struct):
    """A model endpoint, one per (model, endpoint)."""

    model: str
    endpoint: str
    version: int = 0


class PauseRequest(msgspec.Struct):
    """Body of POST /proxy/pause. reject (ours): answer calls 429 while paused, as 1.0 does, instead of holding them."""

    retry_after_seconds: int = 5
    reason: str | None = None
    reject: bool = False


def facade_app(
    store: LightningStore,
    gateway_url: str | None = None,
    *,
    gateway_key: str | None = None,
    hold_seconds: float = 600.0,
    call_seconds: float = 600.0,
) -> App:
    """The ASGI application.

    gateway_url: root of our gateway (`http://host:port`); None: model calls are answered 503. gateway_key: its bearer key, if it has
    one. hold_seconds: how long a call waits for the end of a pause. call_seconds: for the gateway to answer.
    """
    return Facade(store, Proxy(gateway_url, gateway_key, Pause(hold_seconds), call_seconds)).app


def environment(
    base_url: str, rollout_id: str, attempt_id: str, *, mode: str | None, key: str | None = None
) -> dict[str, str]:
    """The three variables for an agent that runs this attempt; `base_url`: where this application is reached from the agent."""
    base = base_url.rstrip("/")
    path = f"/rollout/{rollout_id}/attempt/{attempt_id}"
    kind = "train" if mode in ("train", None) else "val"
    return {
        "AGL_OPENAI_BASE_URL": f"{base}/proxy{path}/mode/{kind}/openai/v1",
        "AGL_EVENT_URL": f"{base}/api/rollouts/{rollout_id}/attempt/{attempt_id}/events",
        "AGL_KEY": key or "none",
    }


async def reported_reward(store: LightningStore, rollout_id: str, attempt_id: str) -> float | None:
    """The newest reward that an attempt's agent has reported; None where it has not."""
    return facade_events.last_reward(await store.query_span_rows(rollout_id, attempt_id))


class Facade:
    """See the module's text; `app` is the application."""

    def __init__(self, store: LightningStore, proxy: Proxy) -> None:
        self._store, self._proxy = store, proxy
        self._terminals = Terminals(store)
        self._begin: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        rollout, attempt = (
            "/api/rollouts/{rollout_id}",
            "/rollout/{rollout_id}/attempt/{attempt_id}",
        )
        call = f"/proxy{attempt}/mode/{{mode}}/openai/v1/{{path:path}}"
        self.app: App = Starlette(
            routes=[
                Route("/healthz", self._healthz, methods=["GET"]),
                Route("/api/rollouts", self._create, methods=["POST"]),
                Route("/api/rollouts", self._list, methods=["GET"]),
                Route("/api/rollouts/terminal", self._terminal, methods=["GET"]),
                Route(rollout, self._get, methods=["GET"]),
                Route(rollout, self._patch, methods=["PATCH"]),
                Route(rollout, self._delete, methods=["DELETE"]),
                Route(
                    f"{rollout}/attempt/{{attempt_id}}/events", self._post_event, methods=["POST"]
                ),
                Route(f"{rollout}/events", self._events, methods=["GET"]),
                Route("/api/models", self._add_models, methods=["POST"]),
                Route("/api/models", self._drop_models, methods=["DELETE"]),
                Route("/proxy/pause", self._pause, methods=["POST"]),
                Route("/proxy/resume", self._resume, methods=["POST"]),
                Route("/proxy/state", self._state, methods=["GET"]),
                Route(call, ModelCalls(self.forward), methods=["POST"]),
            ],
            exception_handlers={AglError: refuse, StoreAway: refuse, HTTPException: no_route},
        )

    async def _healthz(self, request: Request) -> Response:
        return answer({"status": "ok"})

    # Rollouts.

    async def _create(self, request: Request) -> Response:
        """A rollout whose id is known is answered as it is, whatever else the request says of it."""
        items = await read(request, list[facade_records.RolloutCreate])
        asked = [facade_records.request_of(item) for item in items]
        given = [one.rollout_id for one in asked if one.rollout_id and is_id(one.rollout_id)]
        known = {one.rollout_id: one for one in await self._find_many(given)}
        fresh = {one.rollout_id or place: one for place, one in enumerate(asked)}
        new = {key: one for key, one in fresh.items() if key not in known}
        made = await self._store.enqueue_many_rollouts(list(new.values())) if new else []
        found: dict[Any, Rollout | AttemptedRollout] = {
            **known,
            **dict(zip(new, made, strict=True)),
        }
        rollouts = [found[one.rollout_id or place] for place, one in enumerate(asked)]
        return answer([facade_records.wire_rollout(one) for one in rollouts], 201)

    async def _list(self, request: Request) -> Response:
        """In order of creation."""
        names = request.query_params.getlist("state_in")
        if not names or not set(names) <= {*State}:
            raise InputError(f"state_in: expected one or more of {[*State]}, got {names}")
        statuses = [status for status, state in STATE_OF.items() if state in names]
        limit = number(request, "limit", 500)
        page = await self._store.query_rollouts(status_in=statuses, limit=max(limit, 0))
        return answer([facade_records.wire_rollout(one) for one in page])

    async def _terminal(self, request: Request) -> Response:
        after, limit = number(request, "after", 0), number(request, "limit", 1000)
        return answer(await self._terminals.page(max(after, 0), max(limit, 1)))

    async def _get(self, request: Request) -> Response:
        rollout, _ = await self._find(request.path_params["rollout_id"])
        attempts = (await self._store.query_attempts(rollout.rollout_id)).items
        found = AttemptedRollout(rollout=rollout, attempt=attempts[-1]) if attempts else rollout
        names = [facade_records.wire_attempt(one) for one in attempts]
        return answer(
            {"rollout": facade_records.wire_rollout(found), "attempts": list(dict.fromkeys(names))}
        )

    async def _patch(self, request: Request) -> Response:
        """A state goes by 1.0's table (409 else); ours decides what follows, see `_move`."""
        patch = (await read(request, facade_records.RolloutPatch)).status
        rollout, attempt = await self._find(request.path_params["rollout_id"])
        if patch is not None and msgspec.to_builtins(patch):
            if not isinstance(patch.state, UnsetType):
                await self._move(rollout, attempt, patch.state, patch.error_message or None)
            rollout, attempt = await self._find(rollout.rollout_id)
            metadata = facade_records.patched(rollout, patch, time.time())
            rollout = await self._store.update_rollout(rollout.rollout_id, metadata=metadata)
        found = AttemptedRollout(rollout=rollout, attempt=attempt) if attempt else rollout
        return answer(facade_records.wire_rollout(found))

    async def _move(
        self, rollout: Rollout, attempt: Attempt | None, state: State, error: str | None
    ) -> None:
        """running: begins an attempt. succeeded: ends it with the reward that was reported. failed: ends it `agent_error`."""
        now = STATE_OF[rollout.status]
        if state not in NEXT[now] and not _unannounced(rollout, attempt, state):
            raise Conflict(f"Rollout {rollout.rollout_id}: cannot transition {now} -> {state}")
        if state is State.RUNNING:
            await self._attempt(rollout.rollout_id, FIRST)
        elif attempt is None or rollout.status.waiting:
            await self._store.update_rollout(rollout.rollout_id, status=RolloutStatus.FAILED)
        else:
            reason = EndReason.OK if state is State.SUCCEEDED else EndReason.AGENT_ERROR
            key = (rollout.rollout_id, attempt.attempt_id)
            reward = await reported_reward(self._store, *key) if reason is EndReason.OK else None
            text = None if reason is EndReason.OK else error or "its controller said that it failed"
            await self._store.end_attempt(*key, reason, reward=reward, error=text)

    async def _delete(self, request: Request) -> Response:
        """An unknown id is no error; what still runs is cancelled first. Its events go with it."""
        rollout_id = request.path_params["rollout_id"]
        if is_id(rollout_id) and await self._store.get_rollout_by_id(rollout_id) is not None:
            await self._store.cancel_rollouts([rollout_id])
            await self._store.forget_rollouts([rollout_id])
        return Response(status_code=204)

    # Events.

    async def _post_event(self, request: Request) -> Response:
        event = await read(request, facade_events.EventCreate)
        rollout_id, called = request.path_params["rollout_id"], request.path_params["attempt_id"]
        attempt_id = await self._attempt(rollout_id, called)
        row = facade_events.event_row(event, rollout_id, attempt_id)
        await self._store.add_spans(
            rollout_id, attempt_id, span_batch([row]), batch_id=row["span_id"]
        )
        return answer(
            facade_events.Event(
                event.event_type, rollout_id, called, row["start_ns"] / 1e9, event.data
            )
        )

    async def _events(self, request: Request) -> Response:
        """Of the attempt that a PATCH named last, else of the latest."""
        rollout, latest = await self._find(request.path_params["rollout_id"])
        named = facade_records.kept_of(rollout).get("last_attempt_id") or FIRST
        attempt_id = named
        if named == FIRST:
            if latest is None:
                return answer([])
            attempt_id, named = latest.attempt_id, facade_records.wire_attempt(latest)
        rows = await self._store.query_span_rows(rollout.rollout_id, attempt_id)
        events = facade_events.events_of(rows, named)
        kind = request.query_params.get("event_type")
        if kind is not None:
            events = [event for event in events if event.event_type == kind]
        if request.query_params.get("format") == "triplet":
            events = facade_events.triplets(events)
        return answer(events)

    # Models.

    async def _add_models(self, request: Request) -> Response:
        given = await read(request, list[Model])
        kept = msgspec.json.decode(
            await self._store.get_state(MODELS_STATE) or b"[]", type=list[Model]
        )
        models = {(one.model, one.endpoint): one for one in [*kept, *given]}
        await self._publish(list(models.values()))
        return answer(given, 201)

    async def _drop_models(self, request: Request) -> Response:
        await self._publish([])
        return answer({"status": "ok"})

    async def _publish(self, models: Sequence[Model]) -> None:
        await self._store.put_state(MODELS_STATE, msgspec.json.encode(models))
        resources: dict[str, Resource] = {
            f"{one.model}@{one.endpoint}": LLM(
                endpoint=one.endpoint, model=one.model, gateway=False
            )
            for one in models
        }
        await self._store.update_resources(MODELS_ID, resources)

    # Model calls.

    async def _pause(self, request: Request) -> Response:
        asked = await read(request, PauseRequest)
        self._proxy.pause.pause(asked.retry_after_seconds, asked.reason, asked.reject)
        return answer(self._proxy.pause.state())

    async def _resume(self, request: Request) -> Response:
        self._proxy.pause.resume()
        return answer(self._proxy.pause.state())

    async def _state(self, request: Request) -> Response:
        return answer(self._proxy.pause.state())

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A model call."""
        given = scope["path_params"]
        if given["mode"] not in MODES or given["path"] not in PATHS:
            raise NotFound(
                f"{scope['path']}: expected mode train or val and chat/completions or completions"
            )
        body = msgspec.json.decode(await read_body(receive) or b"{}", type=dict[str, Any])
        attempt_id = await self._attempt(given["rollout_id"], given["attempt_id"])
        headers = {
            name.decode("latin-1").lower(): text.decode("latin-1")
            for name, text in scope["headers"]
        }
        call = Call(given["rollout_id"], attempt_id, given["mode"], given["path"], body, headers)
        await self._proxy.answer(call, receive, send)

    # Finding.

    async def _find(self, rollout_id: str) -> tuple[Rollout, Attempt | None]:
        found = None
        if is_id(rollout_id):
            found = await self._store.get_rollout_in_full(rollout_id)
        if found is None:
            raise NotFound(f"Rollout not found: {rollout_id}")
        return found[0], found[1]

    async def _find_many(self, rollout_ids: Sequence[str]) -> Sequence[Rollout | AttemptedRollout]:
        if not rollout_ids:
            return []
        return await self._store.query_rollouts(rollout_id_in=rollout_ids)

    async def _attempt(self, rollout_id: str, called: str) -> str:
        """The attempt's own id. "0" is the latest one, which begins here where the rollout waits: whichever comes first of 1.0's
        controller (PATCH running) and its agent (an event, a model call) takes the rollout out of the queue."""
        for value in (rollout_id, called):  # they go into the gateway's path
            if not is_id(value) or not value.strip(".") or value == "latest":
                raise NotFound(f"no rollout or attempt has the id {value!r}")
        if called != FIRST:
            return called
        lock = self._begin.setdefault(rollout_id, asyncio.Lock())
        async with lock:
            rollout, attempt = await self._find(rollout_id)
            if rollout.status.waiting:
                return (await self._store.start_attempt(rollout_id, KEPT)).attempt_id
        if attempt is None:
            raise Conflict(f"Rollout {rollout_id} is {rollout.status} and has no attempt")
        return attempt.attempt_id


def _unannounced(rollout: Rollout, attempt: Attempt | None, state: State) -> bool:
    """Whether a PATCH to running comes after the agent's own first call has begun the attempt: that is no second beginning."""
    ours = attempt is not None and attempt.worker_id == KEPT and not attempt.status.final
    return state is State.RUNNING and ours and "announced" not in facade_records.kept_of(rollout)
