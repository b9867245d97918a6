"""Spans -> rows to train on: how fast, by policy and by length of the conversation, against agentlightning 0.3's triplet adapter.

The same rollouts on both sides, one after the other on the same machine: calls whose prompts grow as a chat with tools grows, log-probabilities,
the texts that gateway and tracer write beside them, and a reward per call. Ours begins with the Arrow table that the store gives the
learner and ends with rows as arrays and a reward for every call; theirs begins with its spans in memory and ends with its triplets.
Times are CPU time, which a busy machine hardly moves. A whole training step with rows as a tree against the same step without is in bench/tree.py. Called by `agl_ray.cli.bench`; alone: `agl-ray bench trajectory --quick`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.bench import tree
from agl_ray.bench.peers import agentlightning_env as agentlightning
from agl_ray.config.credit import CreditConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.spans import span_batch
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.calls import Calls
from agl_ray.trajectory.credit import Credit
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import RunError

TEXT_CHARS = 200  # of a message
SECONDS, QUICK_SECONDS = 5.0, 0.3  # of CPU time that a case is repeated for
Numbers = dict[str, Any]


class Case(NamedTuple):
    """num_calls calls of `response` tokens, prompts from `first` to `last` tokens. rollouts: how many of them are made into rows at once."""

    name: str
    num_calls: int
    first: int
    last: int
    response: int
    rollouts: int

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Tokens of the whole prompt and of the response, per call."""
        grown = np.linspace(self.first, self.last, self.num_calls).round().astype(int).tolist()
        return [(prompt, self.response) for prompt in grown]


CASES = (
    Case("chat", num_calls=10, first=1_000, last=8_000, response=200, rollouts=64),
    Case("long", num_calls=100, first=1_000, last=8_000, response=20, rollouts=8),
)
KEYS = {
    "adapter_ratio_agl": "tokens per CPU second of case chat, merge-prefix / agentlightning's adapter",
    "adapter_ratio_agl_plain": "the same; theirs without log-probabilities, ours with them",
    "adapter_ratio_agl_long": "the same for case long (with log-probabilities)",
    "CASE_tokens_per_s": "token ids of prompts and responses of all calls per CPU second: spans to rows and rewards, merge-prefix",
    "CASE_per_call_tokens_per_s": "the same with trajectory.rows: per-call",
    "CASE_ms": "CPU ms of a rollout, merge-prefix",
    "CASE_rows": "rows of a rollout, merge-prefix",
    "CASE_row_tokens": "tokens of these rows",
    "CASE_tokens": "token ids of prompts and responses of a rollout's calls",
    "CASE_calls": "calls of a rollout",
    "peer_CASE_tokens_per_s": "agentlightning's adapter, the same tokens per CPU second (also peer_chat_plain_...: without log-probabilities)",
    "peer_CASE_ms": "CPU ms of a rollout there",
    **tree.KEYS,
    "seconds": "the whole benchmark, without the installation",
    "load_1min": "load average of the machine at its end",
    "cpus": "cores of the machine",
}
"""What the keys mean. CASE: chat (10 calls, prompts from 1,000 to 8,000 tokens, responses of 200), long (100 calls, responses of 20)."""


def run_trajectory(
    quick: bool = False, cache: Path = Path(".cache"), *, alone: bool = False
) -> Numbers:
    """Measure; flat keys, see KEYS. The other library's environment is made under `cache` first, unless `alone`.

    InputError: that environment cannot be made, or torch is not there. RunError: one side does not find all calls, tokens or log-probabilities."""
    python = None if alone else agentlightning.environment(cache)
    begin = time.perf_counter()
    seconds = QUICK_SECONDS if quick else SECONDS
    numbers: Numbers = tree.measure(quick)
    for case in CASES:
        numbers |= _ours(case, seconds)
    if python is not None:
        numbers |= _theirs(python, seconds)
        for name, ours, theirs in (
            ("", "chat", "chat"),
            ("_plain", "chat", "chat_plain"),
            ("_long", "long", "long"),
        ):
            ratio = numbers[f"{ours}_tokens_per_s"] / numbers[f"peer_{theirs}_tokens_per_s"]
            numbers[f"adapter_ratio_agl{name}"] = ratio
    numbers["seconds"] = time.perf_counter() - begin
    numbers["load_1min"], numbers["cpus"] = os.getloadavg()[0], os.cpu_count()
    return numbers


def _ours(case: Case, seconds: float) -> Numbers:
    spans, batch = made_up(case)
    credit = Credit(CreditConfig(unit="call", outcome="none"))
    tokens = sum(map(sum, case.sizes))

    def work(config: TrajectoryConfig) -> tuple[Any, Calls]:
        built = build_rows(spans, batch.attempts, config)
        units = credit.units(built.calls, spans, batch)
        if units.reward.sum() != 0.5 * case.num_calls * case.rollouts:
            raise RunError(f"case {case.name}: expected a reward of 0.5 for every call, got others")
        return built.rows, built.calls

    merged, calls = work(TrajectoryConfig())
    if int(merged.weights.sum()) != case.rollouts * case.response * case.num_calls:
        raise RunError(f"case {case.name}: not every response token is in the rows")
    if int(calls.end.sum()) != case.rollouts * tokens:
        raise RunError(f"case {case.name}: expected {tokens} tokens in a rollout's calls")
    numbers: Numbers = {
        f"{case.name}_calls": case.num_calls,
        f"{case.name}_tokens": tokens,
        f"{case.name}_rows": len(merged) / case.rollouts,
        f"{case.name}_row_tokens": len(merged.ids) / case.rollouts,
    }
    for prefix, config in (
        (case.name, TrajectoryConfig()),
        (f"{case.name}_per_call", TrajectoryConfig(rows="per-call")),
    ):
        busy = _cpu_seconds(partial(work, config), seconds) / case.rollouts
        numbers[f"{prefix}_tokens_per_s"] = tokens / busy
        if prefix == case.name:
            numbers[f"{prefix}_ms"] = 1e3 * busy
    return numbers


def _cpu_seconds(work: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one `work`, repeated for that long."""
    work()
    times, begin = 0, time.process_time()
    while times == 0 or time.process_time() - begin < seconds:
        work()
        times += 1
    return (time.process_time() - begin) / times


def _theirs(python: Path, seconds: float) -> Numbers:
    asked = [
        ("chat", CASES[0], 2, True),
        ("chat_plain", CASES[0], 2, False),
        ("long", CASES[1], 1, True),
    ]
    cases = [
        {"rollouts": few, "sizes": case.sizes, "logprobs": logprobs, "text_chars": TEXT_CHARS}
        for _, case, few, logprobs in asked
    ]
    plan = {"cases": cases, "seconds": seconds}
    found = agentlightning.ask(python, agentlightning.TRIPLETS, plan, "triplets")
    numbers: Numbers = {}
    for (name, case, _, logprobs), row in zip(asked, found, strict=True):
        tokens = sum(map(sum, case.sizes))
        made = case.num_calls * case.response
        if (row["calls"], row["tokens"]) != (case.num_calls, tokens) or (
            logprobs and row["logprobs"] != made
        ):
            raise RunError(
                f"agentlightning's adapter, case {name}: expected {case.num_calls} triplets of {tokens} token ids with {made} log-probabilities, got {row}"
            )
        numbers[f"peer_{name}_tokens_per_s"] = tokens / (row["cpu_ms"] / 1e3)
        numbers[f"peer_{name}_ms"] = row["cpu_ms"]
    return numbers


# --- rollouts as the store has them ------------------------------------------------------------------


def made_up(case: Case) -> tuple[pa.Table, TrainBatch]:
    """The spans of the case's rollouts, each with calls as the gateway records them and a reward per call; and their batch."""
    rng = np.random.default_rng(0)
    batches, members = [], []
    for number in range(case.rollouts):
        attempt = {"rollout_id": f"ro-{number}", "attempt_id": f"at-{number}"}
        batches.append(span_batch(_rollout(rng, case.sizes, attempt)))
        members.append(Member(reward=0.0, **attempt))
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=tuple(members)),))
    return pa.Table.from_batches(batches), batch


def _rollout(
    rng: np.random.Generator, sizes: Sequence[tuple[int, int]], attempt: dict[str, str]
) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    shared, parent = 0, None
    for turn, (prompt, response) in enumerate(sizes):
        span_id = f"{turn + 1:016x}"
        base = {**attempt, "start_ns": 0, "end_ns": 1, "status": "OK"}
        ids = rng.integers(0, 150_000, prompt - shared + response).tolist()
        spans += [
            {
                **base, "span_id": span_id, "name": "model.call", "kind": "call", "model": "m", "dialect": "openai.chat",
                "parent_call": parent, "parent_tokens": shared if parent else None,
                "prompt_ids": ids[: prompt - shared], "response_ids": ids[prompt - shared :],
                "response_logprobs": (-rng.random(response)).tolist(), "weight_versions": [(0, 3)],
                "finish_reason": "stop", "prompt_tokens": prompt, "response_tokens": response,
                "attributes": _recorded(turn, prompt - shared, response),
            },
            {**base, "span_id": f"f{span_id[1:]}", "name": "tool.call", "kind": "span", "attributes": {"tool.output": _text(TEXT_CHARS)}},
            {
                **base, "span_id": f"e{span_id[1:]}", "name": "agentlightning.annotation", "kind": "reward", "reward": 0.5,
                "reward_dimension": "primary", "reward_target": span_id,
                "attributes": {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5},
            },
        ]  # fmt: skip
        shared, parent = prompt + response, span_id
    return spans


def _recorded(turn: int, prompt: int, response: int) -> dict[str, Any]:
    """Attributes like the gateway's (gateway/record.py): about four characters of text per token."""
    return {
        "request": {
            "messages_from": 2 * turn,
            "messages": [{"role": "user", "content": _text(TEXT_CHARS)}] * 2,
            "tools": None,
            "sampling": {"temperature": 1.0, "max_tokens": response},
            "metadata": {},
            "template": None,
        },
        "response": {"role": "assistant", "content": _text(4 * response)},
        "agl.session": {"rest": _text(4 * prompt), "body": _text(4 * response), "messages": 2},
        "agl.timings": {"render": 0.001, "engine": 1.0},
        "agl.retokenized_tokens": 0,
    }


def _text(chars: int) -> str:
    return ("word " * (chars // 5 + 1))[:chars]
