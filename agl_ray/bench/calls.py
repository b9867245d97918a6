"""Recorded calls as requests for the engine alone: the same prompts, the same number of response tokens."""

from __future__ import annotations

import asyncio

import pyarrow as pa

from agl_ray.gateway.engine_api import GenerateRequest
from agl_ray.ops.ledger import Ledger
from agl_ray.spans import KIND_CALL
from agl_ray.store import LightningStore
from agl_ray.types import RunError


def recorded_calls(store: LightningStore, ledger: Ledger, most: int) -> list[GenerateRequest]:
    """Up to `most` requests, repeated where the run's last validation had fewer calls."""
    results = ledger.after.results if ledger.after else []
    attempts = [(r.rollout_id, r.attempt_id) for r in results if r.attempt_id is not None]
    sizes = call_sizes(asyncio.run(store.read_spans(attempts)))
    if not sizes:
        raise RunError("the run made no model calls to measure the engine with")
    return [
        GenerateRequest(
            request_id=f"bench-{i}",
            prompt_ids=sizes[i % len(sizes)][0],
            max_tokens=sizes[i % len(sizes)][1],
            ignore_eos=True,
        )
        for i in range(most)
    ]


def call_sizes(spans: pa.Table) -> list[tuple[list[int], int]]:
    """(whole prompt ids, number of response tokens) of each call; suffix-form prompts are made whole again."""
    sequences: dict[str, list[int]] = {}
    calls = []
    for row in spans.to_pylist():
        if row["kind"] != KIND_CALL or row["status"] == "ERROR":
            continue
        head = sequences.get(row["parent_call"], [])[: row["parent_tokens"] or 0]
        prompt = [*head, *row["prompt_ids"]]
        response = row["response_ids"] or []
        sequences[row["span_id"]] = [*prompt, *response]
        if response:
            calls.append((prompt, len(response)))
    return calls
