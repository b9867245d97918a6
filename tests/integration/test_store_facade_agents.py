"""Agents written for agent-lightning 1.0, as processes of their own, run unchanged: under a controller that does what 1.0's does,
against a scripted server; and under a runner of ours, through our real gateway."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from asgi_serving import serving
from gateway_fakes import FakeEngine, save_model_folder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from actors.runner import Runner
from agl_ray.agents import CommandAgent, Host
from agl_ray.config.tracing import TracingConfig
from agl_ray.gateway.door import Door, DoorSettings
from agl_ray.gateway.http import GatewayApp
from agl_ray.gateway.render import Renderer
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.facade import environment, facade_app, reported_reward
from agl_ray.types import LLM, EndReason, EnqueueRolloutRequest

HERE = Path(__file__).parent
LOCAL_RUNNER = (
    "import asyncio, importlib, sys; m, c = sys.argv[1].split(':'); "
    "asyncio.run(getattr(importlib.import_module(m), c)().run())"
)
"""What 1.0's local runner does with `agent_class`."""


async def run_agent(agent: str, variables: dict[str, str]) -> int:
    """The exit code of the agent's process."""
    command = ["-c", LOCAL_RUNNER, agent] if ":" in agent else [str(HERE / agent)]
    environ = {**os.environ, **variables, "PYTHONPATH": str(HERE)}
    process = await asyncio.create_subprocess_exec(sys.executable, *command, env=environ)
    return await asyncio.wait_for(process.wait(), 240)


def scripted(answer_to: Callable[[str], str]) -> Starlette:
    """An OpenAI-like server in the place of the gateway."""

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "policy"}]})

    async def chat(request: Request) -> Response:
        body = await request.json()
        assert body["model"] == "policy"
        message = {"role": "assistant", "content": answer_to(body["messages"][0]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": "policy"}
        return JSONResponse({**head, "choices": [choice]})

    path = "/rollout/{rollout}/attempt/{attempt}/v1"
    return Starlette(
        routes=[
            Route(f"{path}/models", models),
            Route(f"{path}/chat/completions", chat, methods=["POST"]),
        ]
    )


async def control(client: httpx.AsyncClient, url: str) -> None:
    """One round of 1.0's controller: take what is queued, start it, and say how it ended."""
    queued = await client.get("/api/rollouts", params={"state_in": "queuing"})

    async def one(rollout: dict[str, Any]) -> None:
        rollout_id, path = rollout["rollout_id"], f"/api/rollouts/{rollout['rollout_id']}"
        mode = "train" if rollout["is_train"] else "val"
        variables = {
            "AGL_OPENAI_BASE_URL": f"{url}/proxy/rollout/{rollout_id}/attempt/0/mode/{mode}/openai/v1",
            "AGL_EVENT_URL": f"{url}{path}/attempt/0/events",
            "AGL_KEY": "secret",
        }
        for name, field in rollout["config"]["local"]["env_map"].items():
            variables[name] = rollout["input"][field.removeprefix("input.")]
        agent = asyncio.create_task(run_agent(rollout["config"]["local"]["agent_class"], variables))
        running = {"state": "running", "last_attempt_id": "0"}
        (await client.patch(path, json={"status": running})).raise_for_status()
        code = await agent
        end = (
            {"state": "succeeded"}
            if code == 0
            else {"state": "failed", "error_message": f"exit {code}"}
        )
        (await client.patch(path, json={"status": end})).raise_for_status()

    await asyncio.gather(*(one(rollout) for rollout in queued.json()))


def test_agents_run_under_a_controller_of_1_0(tmp_path: Path) -> None:
    def item(agent: str, question: str, answer: str) -> dict[str, Any]:
        env_map = {"QUESTION": "input.question", "ANSWER": "input.answer"}
        local = {"agent_class": agent, "env_map": env_map}
        given = {"question": question, "answer": answer, "data_id": question}
        return {"input": given, "config": {"timeout_seconds": 240, "local": local}}

    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        store = LightningStore.local(core)
        script = {"6*7": "it is 42", "1+1": "3", "0/0": "I cannot"}.__getitem__
        async with (
            serving(scripted(script)) as gateway,
            serving(facade_app(store, gateway)) as url,
            httpx.AsyncClient(base_url=url, timeout=120) as client,
        ):
            items = [
                item("facade_agents:Asking", "6*7", "42"),
                item("facade_agents.py", "1+1", "2"),
                item("facade_agents.py", "0/0", "nan"),
            ]
            made = (await client.post("/api/rollouts", json=items)).json()
            await control(client, url)
            page = (await client.get("/api/rollouts/terminal")).json()
            states = {one["data_id"]: one["state"] for one in page["items"]}
            assert states == {"6*7": "succeeded", "1+1": "succeeded", "0/0": "failed"}
            rewards = []
            for rollout in made:
                path = f"/api/rollouts/{rollout['rollout_id']}/events"
                events = (await client.get(path, params={"format": "triplet"})).json()
                rewards.append([event["data"].get("value") for event in events])
            assert rewards == [[1.0], [0.0], []]
            attempts = await store.get_attempts([one["rollout_id"] for one in made])
            assert [one.end_reason for one in attempts] == ["ok", "ok", "agent_error"]
            assert [one.reward for one in attempts] == [1.0, 0.0, None]
            assert attempts[2].error == "exit 3"
        await core.close()

    asyncio.run(main())


def test_an_agent_of_1_0_is_trained_on_through_our_gateway(tmp_path: Path) -> None:
    renderer = Renderer(save_model_folder(tmp_path / "model"), "hermes")
    words = [*renderer.encode("The answer is 432."), *renderer.stop_ids]

    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        store = LightningStore.local(core)
        engine = FakeEngine(lambda request: (words, "stop"))
        door = Door(store, engine, renderer, DoorSettings(max_model_len=400))
        async with (
            serving(GatewayApp(door, renderer)) as gateway,
            serving(facade_app(store, gateway)) as url,
        ):
            await store.add_resources({"main": LLM(endpoint=gateway, model="policy")})
            await store.enqueue_rollout({"question": "47+385"}, mode="train")
            taken = await store.dequeue_rollout("runner-1")
            assert taken is not None
            key = (taken.rollout_id, taken.attempt_id)
            variables = environment(url, *key, mode=taken.rollout.mode)
            task = {"QUESTION": "what is 47+385?", "ANSWER": "432"}
            assert await run_agent("facade_agents:Asking", variables | task) == 0
            reward = await reported_reward(store, *key)
            ended = await store.end_attempt(*key, EndReason.OK, reward=reward, expected_spans=3)
            assert (ended.end_reason, ended.reward) == ("ok", 1.0)
            rows = await store.query_span_rows(*key)
            assert [row["kind"] for row in rows] == ["call", "call", "reward"]
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                path = f"/api/rollouts/{taken.rollout_id}/events"
                events = (await client.get(path, params={"format": "triplet"})).json()
            first, second = (event["data"] for event in events[:2])
            assert first["prompt_token_ids"] == engine.requests[0].prompt_ids
            assert second["prompt_token_ids"] == engine.requests[1].prompt_ids
            before = [*first["prompt_token_ids"], *first["response_token_ids"]]
            assert second["prompt_token_ids"][: len(before)] == before
            assert first["response_token_ids"] == words
            assert first["response_log_probs"] == [-0.5] * len(words)
            assert first["server"]["version"] == 7
        await core.close()

    asyncio.run(main())


def test_an_agent_of_1_0_runs_unchanged_as_a_command(tmp_path: Path) -> None:
    """Under a runner of ours: its three variables are set, the task goes into its own, the reward that it posts counts."""
    renderer = Renderer(save_model_folder(tmp_path / "model"), "hermes")
    words = [*renderer.encode("The answer is 432."), *renderer.stop_ids]
    agent = CommandAgent(
        [sys.executable, "facade_agents.py"],
        cwd=HERE,
        env_map={"QUESTION": "input.question", "ANSWER": "input.answer"},
    )

    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        store = LightningStore.local(core)
        door = Door(
            store,
            FakeEngine(lambda request: (words, "stop")),
            renderer,
            DoorSettings(max_model_len=400),
        )
        async with (
            serving(GatewayApp(door, renderer)) as gateway,
            serving(facade_app(store, gateway)) as url,
        ):
            await store.add_resources({"main": LLM(endpoint=gateway, model="policy")})
            runner = Runner(
                "runner-1",
                store,
                agent,
                base=str(HERE),
                concurrency=2,
                timeout_seconds=240,
                lease_seconds=120,
                tracing=TracingConfig(instrument="off"),
                otlp=False,
                host=Host(store_url=url, artifacts_folder=str(tmp_path)),
            )
            working = asyncio.ensure_future(runner.run())
            tasks = [{"question": "47+385?", "answer": "432"}, {"question": "1+1?", "answer": "7"}]
            requests = [EnqueueRolloutRequest(input=task, mode="train") for task in tasks]
            rollouts = await store.enqueue_many_rollouts(requests)
            ids = [one.rollout_id for one in rollouts]
            assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=240)) == 2
            attempts = {one.rollout_id: one for one in await store.get_attempts(ids)}
            ends = [(attempts[one].end_reason, attempts[one].reward) for one in ids]
            assert ends == [("ok", 1.0), ("ok", 0.0)]
            rows = await store.query_span_rows(ids[0], attempts[ids[0]].attempt_id)
            assert sorted(row["kind"] for row in rows) == ["call", "reward", "span"]
            await runner.stop()
            await working
        await core.close()

    asyncio.run(main())
