"""agentlightning 0.3's memory store under the benchmark's flow: its own server over HTTP, and in a naive Ray actor.

The flow: dequeue_rollout, N x add_span, update_attempt(succeeded); rollouts are enqueued before the clock starts. Profiles: `light`,
spans of a few short text attributes; `heavy`, model-call spans whose token ids are attributes and whose log-probabilities are JSON
text, as its tracer writes them. The library is used as it is: its server (`agl store`), its client, its memory store.

Run by `agl_ray.bench.peers.agentlightning_env`, with the Python of that library's own environment (nothing of ours is importable
there). Alone: `ENV/bin/python agentlightning_driver.py '{"cases": [["http", "light", 32, 200]], ...}'`; the plan is `Plan`, the
answer, a JSON list with an object per case, is the last line on stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

START_SECONDS = 60.0  # its server needs some seconds to import itself


Case = tuple[str, str, int, int]
"""path (`http` or `actor`), profile, flows in flight, number of flows"""


class Plan(TypedDict):
    """cases: all of path `http` first; the rest: what a span carries."""

    cases: list[Case]
    spans: int
    attributes: int
    attribute_chars: int
    prompt_ids: int
    response_ids: int


class Profile:
    """Attributes are made afresh for each span, as a tracer would, from material made before the clock starts."""

    def __init__(self, name: str, plan: Plan) -> None:
        chance = random.Random(0)
        self.pool: list[dict[str, Any]] = []
        for _ in range(8):
            if name == "light":
                text = "v" * plan["attribute_chars"]
                self.pool.append({f"k{i}": text for i in range(plan["attributes"])})
                continue
            response = [chance.randrange(150_000) for _ in range(plan["response_ids"])]
            logprobs = [
                {"token": "t", "bytes": [116], "logprob": -chance.random(), "top_logprobs": []}
                for _ in response
            ]
            self.pool.append(
                {
                    "gen_ai.request.model": "m",
                    "prompt_token_ids": [
                        chance.randrange(150_000) for _ in range(plan["prompt_ids"])
                    ],
                    "response_token_ids": response,
                    "logprobs.content": json.dumps(logprobs),
                }
            )

    def span(self, rollout_id: str, attempt_id: str, number: int) -> Any:
        from agentlightning.types import Span

        attributes = {
            key: list(value) if isinstance(value, list) else value
            for key, value in self.pool[number % len(self.pool)].items()
        }
        return Span.from_attributes(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=number + 1,
            name="openai.chat.completion",
            attributes=attributes,
            start_time=1.0 + number,
            end_time=1.5 + number,
        )


async def run_flows(
    store: Any, profile: Profile, number: int, in_flight: int, spans: int
) -> tuple[list[float], float, list[str]]:
    """Seconds of each flow, seconds of all, rollout ids."""
    from agentlightning.types import EnqueueRolloutRequest

    for start in range(0, number, 64):
        size = min(64, number - start)
        await store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input={"i": i}) for i in range(size)]
        )
    took: list[float] = []
    done: list[str] = []

    async def work(worker_id: str) -> None:
        while True:
            begin = time.perf_counter()
            taken = await store.dequeue_rollout(worker_id=worker_id)
            if taken is None:
                return
            attempt_id = taken.attempt.attempt_id
            for k in range(spans):
                await store.add_span(profile.span(taken.rollout_id, attempt_id, k))
            await store.update_attempt(taken.rollout_id, attempt_id, status="succeeded")
            took.append(time.perf_counter() - begin)
            done.append(taken.rollout_id)

    begin = time.perf_counter()
    await asyncio.gather(*(work(f"w{i}") for i in range(in_flight)))
    return took, time.perf_counter() - begin, done


async def measure(
    store: Any, profile: Profile, number: int, in_flight: int, spans: int, pid: int
) -> dict[str, float]:
    """One case, after a warm-up, with the store's own word that everything arrived."""
    import psutil

    await run_flows(store, profile, 2 * in_flight, in_flight, spans)  # all connections open
    server, client = psutil.Process(pid), psutil.Process()
    memory, busy = server.memory_info().rss, _cpu(server) + _cpu(client)
    took, seconds, done = await run_flows(store, profile, number, in_flight, spans)
    busy = _cpu(server) + _cpu(client) - busy
    memory = server.memory_info().rss - memory
    succeeded = 0
    for start in range(0, len(done), 50):
        found = await store.query_rollouts(rollout_id_in=done[start : start + 50])
        succeeded += sum(one.status == "succeeded" for one in found)
    held = sum([len(await store.query_spans(one)) for one in done[:10]])
    if (len(done), succeeded, held) != (number, number, spans * min(10, number)):
        raise RuntimeError(
            f"of {number} flows {len(done)} ran, {succeeded} are succeeded in the store, and the first 10 have {held} spans: "
            "agentlightning lost some (with an unpinned OpenTelemetry it loses all spans)"
        )
    took.sort()
    return {
        "per_s": number / seconds,
        "p50_ms": 1e3 * took[number // 2],
        "p99_ms": 1e3 * took[int(number * 0.99)],
        "cpu_ms": 1e3 * busy / number,
        "rss_kb_per_span": memory / 1024 / (number * spans),
    }


def _cpu(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def its_server() -> Iterator[tuple[str, int]]:
    """(address, pid) of `agl store` over a memory store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.path.join(os.path.dirname(sys.executable), "agl"), "store", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend", "memory", "--log-level", "WARNING"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            import agentlightning  # noqa: F401  some seconds, while the server does the same

            _until_healthy(server, port)
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(10)


def _until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/agl/health", timeout=1).read()
            return
        except OSError as error:
            if time.monotonic() > give_up or server.poll() is not None:
                raise RuntimeError(
                    f"agentlightning's store server did not start: {error}"
                ) from error
            time.sleep(0.1)  # a foreign server has no other way to say that it is up


async def over_http(plan: Plan, cases: list[Case]) -> list[dict[str, float]]:
    """Its own client and its own server, one server for all cases."""
    import agentlightning

    found = []
    with its_server() as (address, pid):
        client = agentlightning.LightningStoreClient(address)
        try:
            for _, profile, in_flight, number in cases:
                ready = Profile(profile, plan)
                found.append(await measure(client, ready, number, in_flight, plan["spans"], pid))
        finally:
            await client.close()
    return found


async def in_an_actor(plan: Plan, cases: list[Case]) -> list[dict[str, float]]:
    """Its memory store in a Ray actor, one actor call per method of the store."""
    import agentlightning
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=256 * 2**20,
    )

    class Holder:
        def __init__(self) -> None:
            self.store = agentlightning.InMemoryLightningStore()

        async def pid(self) -> int:
            return os.getpid()

        async def call(self, name: str, arguments: tuple, named: dict) -> Any:
            return await getattr(self.store, name)(*arguments, **named)

    holder: Any = ray.remote(Holder).options(num_cpus=0, max_concurrency=1000).remote()

    class Proxy:
        def __getattr__(self, name: str) -> Any:
            async def call(*arguments: Any, **named: Any) -> Any:
                return await holder.call.remote(name, arguments, named)

            return call

    pid = await holder.pid.remote()
    return [
        await measure(Proxy(), Profile(profile, plan), number, in_flight, plan["spans"], pid)
        for _, profile, in_flight, number in cases
    ]


def main() -> None:
    os.environ.setdefault(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # else its import waits for the network
    plan: Plan = json.loads(sys.argv[1])
    found = []
    for path, run in (("http", over_http), ("actor", in_an_actor)):
        cases = [case for case in plan["cases"] if case[0] == path]
        found += asyncio.run(run(plan, cases)) if cases else []
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
