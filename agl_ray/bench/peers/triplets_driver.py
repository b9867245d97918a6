"""agentlightning 0.3's triplet adapter under the benchmark's rollouts: spans in memory -> triplets, by CPU time.

A rollout is the agent's span and under it, per call, a model-call span as its tracer writes it (token ids as attributes, the chat so far as
text, log-probabilities as JSON text), a tool span and a reward. The library is used as it is: `TracerTraceToTriplet().adapt(spans)`.

Run by `agl_ray.bench.peers.agentlightning_env`, with the Python of that library's own environment (nothing of ours is importable
there). Alone: `ENV/bin/python triplets_driver.py '{"cases": [...], "seconds": 1}'`; the plan is `Plan`, the answer, a JSON list with an
object per case, is the last line on stdout.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any, TypedDict


class Case(TypedDict):
    """rollouts of the same calls: sizes, per call (tokens of the whole prompt, of the response)."""

    rollouts: int
    sizes: list[list[int]]
    logprobs: bool
    text_chars: int


class Plan(TypedDict):
    """seconds: CPU time that each case is repeated for, at least."""

    cases: list[Case]
    seconds: float


def rollout(rng: random.Random, case: Case, number: int) -> list[Any]:
    """The spans of a rollout. Each prompt begins with the one before and its response."""
    from agentlightning.types import Span

    spans: list[Any] = []

    def add(
        name: str, attributes: dict[str, Any], parent: str | None, begin: float, end: float
    ) -> str:
        span_id = f"{len(spans) + 1:016x}"
        spans.append(
            Span.from_attributes(
                rollout_id=f"ro-{number}",
                attempt_id="at-0",
                sequence_id=len(spans) + 1,
                trace_id=f"{number + 1:032x}",
                span_id=span_id,
                parent_id=parent,
                name=name,
                attributes=attributes,
                start_time=begin,
                end_time=end,
            )
        )
        return span_id

    last = 10.0 * len(case["sizes"]) + 5
    root = add("session", {}, None, 0.0, last)
    agent = add("agent", {"agentops.span.kind": "agent"}, root, 0.1, last - 0.1)
    text = "word " * (case["text_chars"] // 5)
    ids: list[int] = []
    for turn, (prompt, response) in enumerate(case["sizes"]):
        begin = 1 + 10.0 * turn
        ids = ids + [rng.randrange(150_000) for _ in range(prompt - len(ids))]
        made = [rng.randrange(150_000) for _ in range(response)]
        attributes: dict[str, Any] = {
            "gen_ai.request.model": "m",
            "gen_ai.request.temperature": 1.0,
            "gen_ai.response.id": f"chatcmpl-{number}-{turn}",
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": text,
            "prompt_token_ids": ids,
            "response_token_ids": made,
        }
        for message in range(2 * turn + 2):
            attributes[f"gen_ai.prompt.{message}.role"] = "user" if message % 2 else "assistant"
            attributes[f"gen_ai.prompt.{message}.content"] = text
        if case["logprobs"]:
            attributes["logprobs.content"] = json.dumps(
                [
                    {"token": str(one), "logprob": -rng.random(), "bytes": None, "top_logprobs": []}
                    for one in made
                ]
            )
        add("openai.chat.completion", attributes, agent, begin, begin + 5)
        add("tool.call", {"tool.name": "search", "tool.output": text}, agent, begin + 5, begin + 6)
        reward = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5}
        add("agentlightning.annotation", reward, agent, begin + 6, begin + 7)
        ids = ids + made
    return spans


def measure(case: Case, seconds: float) -> dict[str, float]:
    """CPU ms of a rollout; calls and token ids (prompt and response of every call) found in one."""
    from agentlightning.adapter.triplet import TracerTraceToTriplet

    rng = random.Random(0)
    rollouts = [rollout(rng, case, number) for number in range(case["rollouts"])]
    adapter = TracerTraceToTriplet()
    found = adapter.adapt(rollouts[0])  # a first time, not counted
    passes, begin = 0, time.process_time()
    while passes == 0 or time.process_time() - begin < seconds:
        for spans in rollouts:
            found = adapter.adapt(spans)
        passes += 1
    busy = time.process_time() - begin
    return {
        "cpu_ms": 1e3 * busy / (passes * len(rollouts)),
        "calls": len(found),
        "tokens": sum(len(t.prompt["token_ids"]) + len(t.response["token_ids"]) for t in found),
        "logprobs": sum(len(t.response.get("logprobs") or ()) for t in found),
    }


def main() -> None:
    os.environ.setdefault(
        "LITELLM_LOCAL_MODEL_COST_MAP", "True"
    )  # else its import waits for the network
    plan: Plan = json.loads(sys.argv[1])
    print(json.dumps([measure(case, plan["seconds"]) for case in plan["cases"]]), flush=True)


if __name__ == "__main__":
    main()
