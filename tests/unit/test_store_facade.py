"""The facade of agent-lightning 1.0 over a real server and a sqlite store: every route, states, events, the proxy, the cursor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_serving import serving
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.facade import environment, facade_app, reported_reward
from agl_ray.types import EndReason, RolloutStatus

Scenario = Callable[["World"], Awaitable[None]]


class Upstream:
    """An OpenAI-like server in the place of our gateway: it answers with what it was asked, as the script says."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.status = 200
        self.left, self.asked = asyncio.Event(), asyncio.Event()
        path = "/rollout/{rollout}/attempt/{attempt}/v1"
        self.app = Starlette(
            routes=[
                Route(f"{path}/models", self._models),
                Route(f"{path}/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if request.path_params["rollout"] == "ro-unknown":
            return JSONResponse({"error": {"message": "no such rollout"}}, 404)
        return JSONResponse({"data": [{"id": "policy"}]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.calls.append((request.url.path, body, dict(request.headers)))
        self.asked.set()
        if not self.gate.is_set():
            await self._wait_or_leave(request)
        if self.status != 200:
            return JSONResponse({"error": {"message": "no"}}, self.status, {"retry-after": "3"})
        text = f"answer {len(self.calls)}"
        if body.get("stream"):
            return StreamingResponse(self._pieces(text), media_type="text/event-stream")
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": [7]}
        return JSONResponse(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
                "prompt_token_ids": [1, 2],
            }
        )

    async def _wait_or_leave(self, request: Request) -> None:
        """For the gate to open, or for the caller to go."""
        gone = asyncio.ensure_future(request.receive())
        opened = asyncio.ensure_future(self.gate.wait())
        await asyncio.wait({gone, opened}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.left.set()
        gone.cancel()
        opened.cancel()

    async def _pieces(self, text: str) -> AsyncIterator[bytes]:
        for word in text.split():
            delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
            yield b"data: " + json.dumps({**event, "choices": [delta]}).encode() + b"\n\n"
            await asyncio.sleep(0.01)
        yield b"data: [DONE]\n\n"


class World:
    """A store, the facade over it, the upstream behind it, and a client of 1.0."""

    def __init__(self, store: LightningStore, url: str, upstream: Upstream, gateway: str) -> None:
        self.store, self.url, self.upstream, self.gateway_url = store, url, upstream, gateway
        self.client = httpx.AsyncClient(base_url=url)

    async def call(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        answer = await self.client.request(method, path, **options)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def create(self, **item: Any) -> dict[str, Any]:
        (made,) = await self.call("POST", "/api/rollouts", 201, json=[{"input": {"q": 1}, **item}])
        return made

    async def patch(self, rollout_id: str, status: int = 200, **fields: Any) -> Any:
        return await self.call(
            "PATCH", f"/api/rollouts/{rollout_id}", status, json={"status": fields}
        )

    async def event(
        self, rollout_id: str, kind: str, data: dict[str, Any], attempt: str = "0"
    ) -> Any:
        path = f"/api/rollouts/{rollout_id}/attempt/{attempt}/events"
        return await self.call("POST", path, json={"event_type": kind, "data": data})


def run(folder: Path, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{folder}/store.db")
        store, upstream = LightningStore.local(core), Upstream()
        try:
            async with (
                serving(upstream.app) as gateway,
                serving(facade_app(store, gateway, **options)) as url,
            ):
                world = World(store, url, upstream, gateway)
                async with world.client:
                    await scenario(world)
        finally:
            await core.close()

    asyncio.run(main())


def test_rollouts_are_created_listed_and_shown(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        config = {
            "timeout_seconds": 9,
            "local": {"agent_class": "a.B", "env_map": {"Q": "input.q"}},
        }
        one = await world.create(config=config, metadata={"batch_idx": 3, "own": 1})
        assert one["status"]["state"] == "queuing"
        assert one["config"]["local"]["env_map"] == {"Q": "input.q"}
        assert one["config"]["k8s"] is None
        assert one["metadata"] == {"batch_idx": 3, "sample_idx_in_batch": None, "own": 1}
        assert (one["is_train"], one["status"]["version"]) == (True, 1)
        kept = await world.store.get_rollout_by_id(one["rollout_id"])
        assert kept is not None
        assert (kept.mode, kept.config.timeout_seconds, kept.config.unresponsive_seconds) == (
            "train",
            9,
            9,
        )
        two = await world.create(is_train=False, rollout_id="mine")
        again = await world.create(is_train=True, rollout_id="mine", metadata={"other": 1})
        assert again == two
        twice = [{"input": 1, "rollout_id": "same"}, {"input": 2, "rollout_id": "same"}]
        made = await world.call("POST", "/api/rollouts", 201, json=twice)
        assert [item["rollout_id"] for item in made] == ["same", "same"]
        listed = await world.call(
            "GET", "/api/rollouts", params={"state_in": ["queuing", "failed"]}
        )
        assert [item["rollout_id"] for item in listed] == [one["rollout_id"], "mine", "same"]
        short = await world.call("GET", "/api/rollouts", params={"state_in": "queuing", "limit": 1})
        assert short == listed[:1]
        shown = await world.call("GET", "/api/rollouts/mine")
        assert shown == {"rollout": two, "attempts": []}
        assert await world.call("GET", "/healthz") == {"status": "ok"}
        missing = await world.call("GET", "/api/rollouts/nobody", 404)
        assert missing == {"detail": "Rollout not found: nobody"}

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/rollouts", "{", 422),
        ("POST", "/api/rollouts", '[{"is_train": true}]', 422),
        ("POST", "/api/rollouts", '[{"input": 1, "rollout_id": "a/b"}]', 422),
        ("POST", "/api/rollouts", '[{"input": 1, "config": {"timeout_seconds": -1}}]', 422),
        ("POST", "/api/rollouts", '[{"input": 1, "metadata": {"agentlightning-1.0": 1}}]', 422),
        ("GET", "/api/rollouts", "", 422),
        ("GET", "/api/rollouts?state_in=preparing", "", 422),
        ("GET", "/api/rollouts?state_in=queuing&limit=x", "", 422),
        ("PATCH", "/api/rollouts/r", '{"status": {"input": 1}}', 422),
        ("PATCH", "/api/rollouts/r", '{"status": {"state": "cancelled"}}', 422),
        ("PATCH", "/api/rollouts/nobody", '{"status": {"state": "running"}}', 404),
        ("POST", "/api/rollouts/r/attempt/0/events", '{"event_type": "reward"}', 422),
        ("POST", "/api/rollouts/r/attempt/0/events", '{"data": {}}', 422),
        ("POST", "/api/rollouts/r/attempt/latest/events", '{"event_type": "x"}', 404),
        ("POST", "/api/rollouts/r/attempt/at-unknown/events", '{"event_type": "x"}', 404),
        ("POST", "/api/rollouts/nobody/attempt/0/events", '{"event_type": "x"}', 404),
        ("GET", "/api/rollouts/nobody/events", "", 404),
        ("POST", "/api/models", '{"model": "m"}', 422),
        ("POST", "/proxy/pause", '{"retry_after_seconds": "soon"}', 422),
        ("POST", "/proxy/rollout/r/attempt/0/mode/test/openai/v1/chat/completions", "{}", 404),
        ("POST", "/proxy/rollout/r/attempt/0/mode/val/openai/v1/embeddings", "{}", 404),
        ("POST", "/proxy/rollout/r/attempt/0/mode/val/openai/v1/chat/completions", "[]", 400),
        ("POST", "/proxy/rollout/nobody/attempt/0/mode/val/openai/v1/chat/completions", "{}", 404),
        ("POST", "/proxy/rollout/%2e%2e/attempt/a/mode/val/openai/v1/chat/completions", "{}", 404),
        ("GET", "/api/nothing", "", 404),
        ("DELETE", "/proxy/state", "", 405),
    ],
)
def test_bad_requests_are_refused_with_a_detail(
    tmp_path: Path, method: str, path: str, body: str, status: int
) -> None:
    async def scenario(world: World) -> None:
        await world.create(rollout_id="r")
        answer = await world.call(method, path, status, content=body)
        assert isinstance(answer["detail"], str)

    run(tmp_path, scenario)


def test_states_move_by_the_table_of_1_0(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        rollout_id = (await world.create())["rollout_id"]
        refused = await world.patch(rollout_id, 409, state="succeeded")
        assert "cannot transition queuing -> succeeded" in refused["detail"]
        running = await world.patch(
            rollout_id, state="running", last_attempt_id="0", k8s_job_name="j"
        )
        status = running["status"]
        assert (status["state"], status["version"], status["k8s_job_name"]) == ("running", 2, "j")
        await world.patch(rollout_id, 409, state="running")
        same = await world.patch(rollout_id)
        assert same["status"]["version"] == 2
        await world.event(rollout_id, "reward", {"value": 0.25})
        await world.event(rollout_id, "reward", {"value": 0.75})
        done = await world.patch(rollout_id, state="succeeded")
        assert (done["status"]["state"], done["status"]["version"]) == ("succeeded", 3)
        for state in ("queuing", "running", "succeeded", "failed"):
            await world.patch(rollout_id, 409, state=state)
        attempt = await world.store.get_latest_attempt(rollout_id)
        assert attempt is not None
        assert (attempt.end_reason, attempt.reward) == (EndReason.OK, 0.75)
        assert await reported_reward(world.store, rollout_id, attempt.attempt_id) == 0.75
        shown = await world.call("GET", f"/api/rollouts/{rollout_id}")
        assert shown["attempts"] == ["0"]

    run(tmp_path, scenario)


def test_failures_and_cancels_are_failed(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        never, broken, cancelled = [(await world.create())["rollout_id"] for _ in range(3)]
        unborn = await world.patch(never, state="failed", error_message="invalid template")
        assert unborn["status"]["error_message"] == "invalid template"
        assert (await world.call("GET", f"/api/rollouts/{never}/events")) == []
        path = f"/api/rollouts/{never}/attempt/0/events"
        await world.call("POST", path, 409, json={"event_type": "x"})
        await world.patch(broken, state="running")
        await world.patch(broken, state="failed", error_message="exit code 1")
        attempt = await world.store.get_latest_attempt(broken)
        assert attempt is not None
        assert (attempt.end_reason, attempt.error) == (EndReason.AGENT_ERROR, "exit code 1")
        await world.store.cancel_rollouts([cancelled])
        failed = await world.call("GET", "/api/rollouts", params={"state_in": "failed"})
        assert [one["rollout_id"] for one in failed] == [never, broken, cancelled]

    run(tmp_path, scenario)


def test_our_own_runners_rollouts_are_shown_too(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"data_id": 5}, mode="val")
        shown = await world.call("GET", f"/api/rollouts/{started.rollout_id}")
        assert shown["attempts"] == [started.attempt_id]
        assert shown["rollout"]["status"]["last_attempt_id"] == started.attempt_id
        assert (shown["rollout"]["is_train"], shown["rollout"]["status"]["state"]) == (
            False,
            "running",
        )
        event = await world.event(started.rollout_id, "note", {"a": [1]}, started.attempt_id)
        assert (event["event_type"], event["attempt_id"]) == ("note", started.attempt_id)
        assert await world.call("GET", f"/api/rollouts/{started.rollout_id}/events") == [event]
        await world.patch(started.rollout_id, 409, state="running")

    run(tmp_path, scenario)


def test_whoever_comes_first_begins_the_attempt_and_only_one_is_begun(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        rollout_id = (await world.create())["rollout_id"]
        posts = [world.event(rollout_id, "note", {"n": number}) for number in range(8)]
        await asyncio.gather(world.patch(rollout_id, state="running"), *posts)
        attempts = await world.store.query_attempts(rollout_id)
        assert [one.num_spans for one in attempts] == [8]
        await world.patch(rollout_id, state="succeeded")
        # A trainer's judge may report a reward after the end.
        await world.event(rollout_id, "reward", {"value": 0.5, "source": "judge"})
        events = await world.call("GET", f"/api/rollouts/{rollout_id}/events")
        assert [event["event_type"] for event in events] == ["note"] * 8 + ["reward"]
        assert {event["attempt_id"] for event in events} == {"0"}

    run(tmp_path, scenario)


CALL = {
    "name": "model.call",
    "kind": "call",
    "start_ns": 10**9,
    "end_ns": 2 * 10**9,
    "status": "OK",
    "model": "policy",
    "finish_reason": "stop",
    "prompt_tokens": 2,
    "response_tokens": 1,
    "weight_versions": [(0, 4)],
}


async def add_calls(world: World, rollout_id: str, attempt_id: str) -> None:
    """Two calls as the gateway records them, the second continuing the first; a retry of it; one that failed."""
    ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    user = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "yo"}
    first = {
        **CALL,
        **ids,
        "span_id": "a" * 16,
        "prompt_ids": [1, 2],
        "response_ids": [3],
        "response_logprobs": [-0.5],
        "attributes": {"request": {"messages_from": 0, "messages": [user]}, "response": answer},
    }
    second = {
        **CALL,
        **ids,
        "parent_call": "a" * 16,
        "parent_tokens": 3,
        "prompt_ids": [9],
        "response_ids": [4, 5],
        "response_logprobs": [-1.0, -2.0],
        "attributes": {"request": {"messages_from": 2, "messages": [user]}, "response": answer},
    }
    failed = {
        **ids,
        "span_id": "d" * 16,
        "name": "model.call.failed",
        "kind": "span",
        "start_ns": 1,
        "end_ns": 1,
        "status": "ERROR",
        "status_message": "engine died",
    }
    rows = [first, second | {"span_id": "b" * 16}, second | {"span_id": "c" * 16}, failed]
    await world.store.add_spans(rollout_id, attempt_id, span_batch(rows))


def test_events_tell_of_calls_rewards_and_whatever_was_posted(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"q": 1}, mode="train")
        rollout_id, attempt_id = started.rollout_id, started.attempt_id
        await add_calls(world, rollout_id, attempt_id)
        await world.event(rollout_id, "patch", {"diff": "+1"})
        await world.event(rollout_id, "reward", {"value": 1, "source": "agent", "message": "good"})
        path = f"/api/rollouts/{rollout_id}/events"
        events = await world.call("GET", path)
        kinds = [event["event_type"] for event in events]
        assert kinds == ["model_request"] * 4 + ["patch", "reward"]
        whole = events[2]["data"]
        assert whole["response"]["prompt_token_ids"] == [1, 2, 3, 9]
        assert whole["response"]["choices"][0]["token_ids"] == [4, 5]
        assert [one["content"] for one in whole["request"]["messages"]] == ["hi", "yo", "hi"]
        assert (whole["model"], whole["model_version"], whole["latency_ms"]) == (
            "policy",
            4,
            1000.0,
        )
        assert events[3]["data"]["status"] == "error"
        only = await world.call("GET", path, params={"event_type": "reward"})
        assert [event["data"]["value"] for event in only] == [1]
        trimmed = await world.call("GET", path, params={"format": "triplet"})
        assert [event["event_type"] for event in trimmed] == ["model_request"] * 3 + [
            "patch",
            "reward",
        ]
        assert trimmed[1]["data"] == {
            "prompt_token_ids": [1, 2, 3, 9],
            "response_token_ids": [4, 5],
            "response_log_probs": [-1.0, -2.0],
            "server": {"model": "policy", "version": 4},
            "http_status": 200,
            "status": "ok",
        }
        assert trimmed[2]["data"]["error"] == {"message": "engine died"}
        assert trimmed[4]["data"] == {"value": 1, "source": "agent"}
        rows = await world.store.query_span_rows(rollout_id)
        assert (rows[-1]["kind"], rows[-1]["reward"]) == ("reward", 1.0)

    run(tmp_path, scenario)


def test_the_terminal_cursor_sees_every_completion_once(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        async def page(after: int, limit: int = 1000) -> dict[str, Any]:
            params = {"after": after, "limit": limit}
            return await world.call("GET", "/api/rollouts/terminal", params=params)

        assert await page(0) == {"items": [], "next_after": 0, "total_terminal": 0}
        ids = []
        for number in range(7):
            made = await world.create(input={"data_id": number and f"d{number}"})
            ids.append(made["rollout_id"])
        for rollout_id in ids[:2]:
            await world.patch(rollout_id, state="failed")
        await world.store.cancel_rollouts(ids[2:5])  # in one moment
        first = await page(0, 1)
        assert [item["rollout_id"] for item in first["items"]] == ids[:1]
        assert first["items"][0] | {"rollout_id": ""} == {
            "rollout_id": "",
            "state": "failed",
            "data_id": "",
            "is_train": True,
        }
        assert first["total_terminal"] == 5
        second = await page(first["next_after"], 2)
        assert second["items"][0]["rollout_id"] == ids[1]
        assert {item["rollout_id"] for item in second["items"]} == set(ids[1:5])
        assert await page(second["next_after"]) == {**second, "items": []}
        await world.patch(ids[6], state="failed")
        async with (
            serving(facade_app(world.store)) as url,
            httpx.AsyncClient(base_url=url) as other,
        ):
            params = {"after": second["next_after"]}
            third = (await other.get("/api/rollouts/terminal", params=params)).json()
        assert [item["rollout_id"] for item in third["items"]] == [ids[6]]
        # One that was seen goes back to the queue: what follows it is not skipped for that.
        await world.store.update_rollout(ids[0], status=RolloutStatus.QUEUING)
        await world.patch(ids[5], state="failed")
        last = await page(third["next_after"])
        assert [item["rollout_id"] for item in last["items"]] == [ids[5]]

    run(tmp_path, scenario)


def test_a_deleted_rollout_is_gone_with_its_events_and_deleting_again_is_no_error(
    tmp_path: Path,
) -> None:
    async def scenario(world: World) -> None:
        kept, gone = await world.create(), await world.create()
        await world.patch(gone["rollout_id"], state="running")
        await world.event(gone["rollout_id"], "reward", {"value": 1.0})
        for _ in range(2):
            await world.call("DELETE", f"/api/rollouts/{gone['rollout_id']}", 204)
        await world.call("GET", f"/api/rollouts/{gone['rollout_id']}", 404)
        assert await world.store.query_spans(kept["rollout_id"]) is not None
        assert (await world.store.statistics())["rollouts"] == 1

    run(tmp_path, scenario)


def test_models_are_a_resource(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        one = {"model": "m", "endpoint": "http://a/v1", "version": 3}
        assert await world.call("POST", "/api/models", 201, json=[one]) == [one]
        two = {"model": "m", "endpoint": "http://b/v1"}
        await world.call("POST", "/api/models", 201, json=[two, one])
        latest = await world.store.get_latest_resources()
        assert latest is not None
        assert {llm.endpoint for llm in latest.resources.values()} == {"http://a/v1", "http://b/v1"}
        assert await world.call("DELETE", "/api/models") == {"status": "ok"}
        latest = await world.store.get_latest_resources()
        assert latest is not None
        assert latest.resources == {}

    run(tmp_path, scenario)


def client_of(
    world: World, rollout_id: str, attempt_id: str = "0", mode: str = "train"
) -> AsyncOpenAI:
    env = environment(world.url, rollout_id, attempt_id, mode=mode)
    return AsyncOpenAI(base_url=env["AGL_OPENAI_BASE_URL"], api_key=env["AGL_KEY"], max_retries=0)


MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_model_calls_go_to_the_gateway_under_the_runs_model(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        rollout_id = (await world.create())["rollout_id"]
        async with client_of(world, rollout_id) as client:
            answer = await client.chat.completions.create(
                model="whatever", messages=MESSAGES, temperature=0.0
            )
            assert answer.choices[0].message.content == "answer 1"
            stream = await client.chat.completions.create(model="x", messages=MESSAGES, stream=True)
            words = [chunk.choices[0].delta.content async for chunk in stream]
        assert words == ["answer", "2"]
        attempt = await world.store.get_latest_attempt(rollout_id)
        assert attempt is not None
        path, body, headers = world.upstream.calls[0]
        assert path == f"/rollout/{rollout_id}/attempt/{attempt.attempt_id}/v1/chat/completions"
        assert (body["model"], body["logprobs"], body["return_token_ids"]) == ("policy", True, True)
        assert "temperature" not in body
        assert headers["authorization"] == "Bearer gateway-key"
        assert headers["x-stainless-retry-count"] == "0"
        async with client_of(world, rollout_id, attempt.attempt_id, "val") as client:
            await client.chat.completions.create(model="x", messages=MESSAGES)
        assert "logprobs" not in world.upstream.calls[-1][1]
        running = await world.patch(rollout_id, state="running", last_attempt_id="0")
        assert running["status"]["state"] == "running"  # the agent was faster than its controller

    run(tmp_path, scenario, gateway_key="gateway-key")


def test_a_paused_proxy_holds_calls_and_counts_those_under_way(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"q": 1}, mode="train")
        world.upstream.gate.clear()
        async with client_of(world, started.rollout_id, started.attempt_id) as client:

            async def ask() -> Any:
                return await client.chat.completions.create(model="x", messages=MESSAGES)

            first = asyncio.create_task(ask())
            await asyncio.wait_for(world.upstream.asked.wait(), 60)
            paused = await world.call("POST", "/proxy/pause", json={"reason": "weights"})
            assert paused == {
                "paused": True,
                "retry_after_seconds": 5,
                "reason": "weights",
                "inflight": 1,
            }
            world.upstream.gate.set()
            await first
            second = asyncio.create_task(ask())
            await asyncio.sleep(0.2)
            state = await world.call("GET", "/proxy/state")
            assert (state["inflight"], second.done(), len(world.upstream.calls)) == (0, False, 1)
            resumed = await world.call("POST", "/proxy/resume")
            assert (resumed["paused"], resumed["reason"]) == (False, None)
            assert (await second).choices[0].message.content == "answer 2"
            await world.call(
                "POST", "/proxy/pause", json={"reject": True, "retry_after_seconds": 2}
            )
            path = client.base_url.raw_path.decode() + "chat/completions"
            refused = await world.client.post(path, json={"messages": []})
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert refused.json()["error"] == "gateway paused"

    run(tmp_path, scenario, hold_seconds=120)


def test_a_call_that_was_held_for_long_enough_is_told_to_come_again(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"q": 1}, mode="train")
        env = environment(world.url, started.rollout_id, started.attempt_id, mode="train")
        await world.call("POST", "/proxy/pause", json={})
        path = f"{env['AGL_OPENAI_BASE_URL']}/chat/completions"
        late = await world.client.post(path, json={"messages": []})
        assert late.status_code == 429

    run(tmp_path, scenario, hold_seconds=0.2)


def test_a_caller_who_leaves_a_held_or_a_running_call_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"q": 1}, mode="train")
        env = environment(world.url, started.rollout_id, started.attempt_id, mode="train")
        path = f"{env['AGL_OPENAI_BASE_URL']}/chat/completions"
        world.upstream.gate.clear()
        caller = asyncio.ensure_future(world.client.post(path, json={"messages": []}))
        await asyncio.wait_for(world.upstream.asked.wait(), 60)
        caller.cancel()
        await asyncio.wait_for(world.upstream.left.wait(), 60)
        await world.call("POST", "/proxy/pause", json={})
        with pytest.raises(httpx.ReadTimeout):
            await world.client.post(path, json={"messages": []}, timeout=0.3)
        await world.call("POST", "/proxy/resume")
        await asyncio.sleep(0.1)
        assert len(world.upstream.calls) == 1
        assert (await world.call("GET", "/proxy/state"))["inflight"] == 0

    run(tmp_path, scenario)


def test_errors_of_the_gateway_reach_the_agent(tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        started = await world.store.start_rollout({"q": 1}, mode="train")
        env = environment(world.url, started.rollout_id, started.attempt_id, mode="train")
        path = f"{env['AGL_OPENAI_BASE_URL']}/chat/completions"
        world.upstream.status = 400
        refused = await world.client.post(path, json={"messages": []})
        assert (refused.status_code, refused.json()) == (400, {"error": {"message": "no"}})
        assert refused.headers["retry-after"] == "3"
        unknown = path.replace(started.rollout_id, "ro-unknown")
        assert (await world.client.post(unknown, json={"messages": []})).status_code == 404
        async with serving(facade_app(world.store, "http://127.0.0.1:9")) as url:
            gone = await world.client.post(path.replace(world.url, url), json={"messages": []})
            assert gone.status_code == 502
        async with serving(facade_app(world.store)) as url:
            none = await world.client.post(path.replace(world.url, url), json={"messages": []})
            assert (none.status_code, "no gateway" in none.json()["detail"]) == (503, True)
        world.upstream.gate.clear()
        async with serving(facade_app(world.store, world.gateway_url, call_seconds=0.3)) as url:
            started_at = time.monotonic()
            slow = await world.client.post(path.replace(world.url, url), json={"messages": []})
            assert (slow.status_code, time.monotonic() - started_at < 20) == (504, True)

    run(tmp_path, scenario)
