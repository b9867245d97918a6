"""What `agl-ray bench gateway` measures, and what its keys mean.

Sizes: `chat` is 200 prompt and 64 response tokens; `8k` is 8,192 and 1,024. Every conversation has TURNS calls, the prompt of each with all
that was said before, and both sizes are means over a conversation's calls. The rollouts of a group of GROUP share their first prompt, as a
trainer's do; `8k_new` is the size 8k with one call per conversation and no two prompts alike. Called by `agl_ray.bench.gateway`.
Test alone: tests/unit/test_bench_gateway.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Tokens: `prompt` of the first call, `added` by the caller before each later one, `response` of every call."""

    name: str
    prompt: int
    added: int
    response: int
    turns: int
    group: int

    @property
    def mean_prompt(self) -> float:
        return self.prompt + (self.turns - 1) / 2 * (self.added + self.response)


CHAT = Size("chat", 80, 16, 64, 4, 8)
LONG = Size("8k", 5120, 1024, 1024, 4, 8)
LONG_NEW = Size("8k_new", 8192, 0, 1024, 1, 1)

_LOAD = {
    "calls_per_s_{}": "calls per second through the gateway, with {} in flight",
    "echo_calls_per_s_{}": "the same calls to a plain ASGI echo under uvicorn",
    "gateway_cpu_ms_{}": "CPU time of the gateway's process per call; 1000 / it is what one replica with a core of its own could do",
    "system_cpu_ms_{}": "CPU time of everything but the caller: gateway, engine, store, HAProxy, Ray",
}
_ALONE = {
    "p50_ms_{}": "median of a call through the gateway, one after the other",
    "p99_ms_{}": "its 99th percentile",
    "echo_p50_ms_{}": "median of the same call to the echo",
    "echo_p99_ms_{}": "its 99th percentile",
}
_VLLM = {
    "vllm_p50_ms_{}": "median of a call to a bare `vllm serve`, one after the other (full run)",
    "ours_p50_ms_{}": "the same call to our gateway and engine on the same model (full run)",
    "vllm_calls_per_s_{}": "calls per second of the bare `vllm serve` (full run)",
    "ours_calls_per_s_{}": "calls per second of our gateway and engine (full run)",
    "vllm_added_p50_ms_{}": "ours_p50_ms - vllm_p50_ms: what gateway, Serve and journal add to a call of the bare server (full run)",
    "vllm_ratio_{}": "ours_calls_per_s / vllm_calls_per_s: 1 = our road to the engine costs nothing (full run)",
}
IN_FLIGHT = 16

KEYS = {
    "added_p50_ms": "p50_ms_chat - echo_p50_ms_chat: what gateway, Serve, engine handle and journal add to an empty call",
    "added_p99_ms": "p99_ms_chat - echo_p99_ms_chat",
    "added_p50_ms_8k": "p50_ms_8k - echo_p50_ms_8k",
    "added_p99_ms_8k": "p99_ms_8k - echo_p99_ms_8k",
    **{
        key.format(size.name): text.format(IN_FLIGHT)
        for size in (CHAT, LONG, LONG_NEW)
        for key, text in _LOAD.items()
    },
    **{key.format(size.name): text for size in (CHAT, LONG) for key, text in _ALONE.items()},
    "retokenized_tokens": "response tokens that came back as other ids, over all measured conversations (0, or nothing is measured)",
    "rss_kb_per_call": "KiB of the gateway's memory per call of size 8k in conversations that are still open",
    "open_sessions": "conversations opened by one call each and left open",
    "sessions_rss_mb": "MiB of the gateway's memory that they took",
    "sessions_p50_ms": "median of a second call in them",
    "growth_calls": "calls (chat size) of the memory measurement",
    "rss_growth_mb": "MiB by which the gateway's process grew from a fifth of these calls to the last (an attempt is forgotten 10 to 15 "
    "seconds after its end, so with --quick most of them are still there)",
    "rss_mb": "MiB of that process at the end",
    "rollouts": "rollouts of an agent that only returns a reward, through one runner and the store actor",
    "rollouts_per_min": "such rollouts per minute, from the first in the queue to the last one's end",
    **{key.format(size.name): text for size in (CHAT, LONG) for key, text in _VLLM.items()},
    "fsync_ms": "a write of 4 KiB with fsync on the journal's disk: every answer waits for one",
    "foreign_share": "share of the machine's cores that other processes used meanwhile (above 0.2: repeat it)",
    "seconds": "the whole benchmark",
    "load_1min": "load average of the machine at its end",
    "cpus": "cores of the machine",
}
