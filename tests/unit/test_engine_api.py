"""The structs between gateway and engine: they survive pickling and msgpack, and chunks join to the whole result."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from agl_ray.gateway.engine_api import (
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    join_chunks,
)


def test_request_and_result_survive_pickle_and_msgpack() -> None:
    request = GenerateRequest(request_id="a", prompt_ids=[1, 2], max_tokens=3, stop=["x"])
    result = GenerateResult(
        response_ids=[5], logprobs=[-0.5], weight_versions=[(0, 3)], finish_reason="stop"
    )
    assert pickle.loads(pickle.dumps(request)) == request
    assert pickle.loads(pickle.dumps(result)) == result
    for value in (request, result):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value


def test_default_lists_are_not_shared() -> None:
    first = GenerateRequest(request_id="a", prompt_ids=[1], max_tokens=1)
    first.stop.append("x")
    assert GenerateRequest(request_id="b", prompt_ids=[1], max_tokens=1).stop == []


def test_chunks_join() -> None:
    chunks = [
        GenerateChunk(response_ids=[1, 2], logprobs=[-1.0, -2.0]),
        GenerateChunk(response_ids=[3, 4], logprobs=[-3.0, -4.0]),
        GenerateChunk(
            response_ids=[],
            logprobs=[],
            weight_versions=[(0, 4), (3, 5)],
            finish_reason="length",
            cached_tokens=8,
        ),
    ]
    assert join_chunks(chunks) == GenerateResult(
        response_ids=[1, 2, 3, 4],
        logprobs=[-1.0, -2.0, -3.0, -4.0],
        weight_versions=[(0, 4), (3, 5)],
        finish_reason="length",
        cached_tokens=8,
    )


def test_a_broken_stream_is_no_result() -> None:
    with pytest.raises(ValueError, match="without a finish reason"):
        join_chunks([GenerateChunk(response_ids=[1], logprobs=[-1.0])])
    with pytest.raises(ValueError, match="without a finish reason"):
        join_chunks([])
