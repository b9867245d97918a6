"""Parts of the MongoDB journal that need no server: documents and filters, the gate, the words of errors."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mongomock.filtering import filter_applies
from pymongo.errors import AutoReconnect, OperationFailure

from agl_ray.store.journals import mongo_documents as documents
from agl_ray.store.journals.base import Condition, Query, Row, SpanRow
from agl_ray.store.journals.mongo_gate import Gate
from agl_ray.store.journals.mongo_trouble import Server
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import StoreError

TEXTS = st.text(max_size=4)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


# Documents.


@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_records_of_runs_never_share_a_name(run: str, key: str, run2: str, key2: str) -> None:
    same = documents.scope(run) + key == documents.scope(run2) + key2
    assert same == ((run, key) == (run2, key2))


@given(
    TEXTS,
    st.text(alphabet="a\ud7ff\ue000\U0010fffe\U0010ffff/%", max_size=4),
    st.text(max_size=3),
    TEXTS,
)
def test_a_prefix_is_a_range(run: str, prefix: str, more: str, other: str) -> None:
    wanted = documents.with_prefix(run, prefix)["_id"]

    def inside(key: str) -> bool:
        return bool(wanted["$gte"] <= documents.scope(run) + key < wanted["$lt"])

    assert inside(prefix + more)
    assert inside(other) == other.startswith(prefix)


@given(TEXTS, TEXTS)
def test_a_part_of_a_text_is_a_pattern(part: str, text: str) -> None:
    query = Query("rollout", must=(Condition("mode", contains=part),))
    [condition] = documents.filter_of("r", query, paged=False)["$and"]
    pattern = condition["mode"]["$regex"]
    assert "\0" not in pattern, "BSON has no such pattern"
    assert bool(re.search(pattern, text)) == (part in text)


@given(st.integers(0, 5), st.binary(min_size=0, max_size=40), st.integers(1, 15))
def test_payloads_come_back_from_their_chunks(first: int, payload: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", size)
        span = SpanRow("b", ("ro", "at"), first, 2, payload)
        *chunks, (name, document) = documents.put_span("r", span, 1)
    assert name == "span"
    assert all(len(chunk["payload"]) <= size for _, chunk in chunks)
    parts = {chunk["_id"]: chunk["payload"] for _, chunk in chunks}
    assert documents.span_of(document, parts) == span
    if chunks:
        parts.popitem()
        with pytest.raises(StoreError, match="damaged"):
            documents.span_of(document, parts)


def test_an_order_with_empty_values_goes_on_behind_them() -> None:
    columns = [None, None, "a", "b", "b"]
    rows = [
        documents.put_row("r", Row("rollout", str(i), 0, (i, "x", mode, 1.0, None, None), b""), 1)[
            1
        ]
        for i, mode in enumerate(columns)
    ]
    for descending, order in ((False, [0, 1, 2, 3, 4]), (True, [4, 3, 2, 1, 0])):
        for place, i in enumerate(order):
            question = Query(
                "rollout", order_by="mode", descending=descending, after=(columns[i], str(i))
            )
            match = documents.filter_of("r", question, paged=True)
            behind = {int(row["key"]) for row in rows if filter_applies(match, row)}
            assert behind == set(order[place + 1 :]), (descending, i)


# The gate.


def test_readers_share_and_writers_do_not() -> None:
    async def test() -> None:
        gate, inside, log = Gate(), {"readers": 0, "writers": 0}, []

        async def read() -> None:
            async with gate.among():
                inside["readers"] += 1
                assert inside["writers"] == 0
                log.append(inside["readers"])
                await asyncio.sleep(0.001)
                inside["readers"] -= 1

        async def write() -> None:
            async with gate.alone():
                inside["writers"] += 1
                assert inside == {"readers": 0, "writers": 1}
                await asyncio.sleep(0.001)
                inside["writers"] -= 1

        await asyncio.wait_for(
            asyncio.gather(*(read() if i % 4 else write() for i in range(40))), 10
        )
        assert max(log) > 1, "readers were together"

    run(test())


def test_a_waiting_writer_goes_first_and_cancelled_ones_block_nobody() -> None:
    async def test() -> None:
        gate, order = Gate(), []

        async def use(name: str, way: Any, seconds: float = 0.0) -> None:
            async with way():
                order.append(name)
                await asyncio.sleep(seconds)

        first = asyncio.ensure_future(use("r1", gate.among, 5))
        await asyncio.sleep(0)
        gone = asyncio.ensure_future(use("never", gate.alone))
        writer = asyncio.ensure_future(use("w", gate.alone))
        await asyncio.sleep(0)
        reader = asyncio.ensure_future(use("r2", gate.among))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()
        await asyncio.wait_for(asyncio.gather(writer, reader), 60)
        assert order == ["r1", "w", "r2"]

    run(test())


# Trouble.


def server(seconds: float = 1.0) -> Server:
    return Server("mongodb://me:secret@h1:1,h2:2/mine?maxPoolSize=7", "run-1", "other", seconds)


def test_errors_say_where_what_and_what_to_do() -> None:
    async def test() -> None:
        for error, advice in (
            (OperationFailure("Authentication failed.", 18), "check user, password"),
            (OperationFailure("not authorized on mine to execute command", 13), "role readWrite"),
            (OperationFailure("something else", 1), "check the server and its log"),
            (UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates"), None),
        ):

            async def work(error: Exception = error) -> None:
                raise error

            if advice is None:
                with pytest.raises(UnicodeEncodeError):
                    await server().persist("write", work)
                continue
            with pytest.raises(StoreError, match=f"cannot write.*{advice}") as caught:
                await server().persist("write", work)
            assert "store journal mongodb h1:1,h2:2, database 'mine', run 'run-1'" in str(
                caught.value
            )
            assert "secret" not in str(caught.value)

    run(test())


def test_what_passes_is_tried_again_and_what_does_not_is_not() -> None:
    async def test() -> None:
        tries = {"left": 2, "lock": 1, "final": 0}

        async def passing() -> str:
            tries["left"] -= 1
            if tries["left"] >= 0:
                raise AutoReconnect("connection closed")
            return "done"

        async def lockless() -> str:
            tries["lock"] -= 1
            if tries["lock"] >= 0:
                raise RuntimeError("cannot wait on un-acquired lock")
            return "done"

        async def mistaken() -> None:
            raise RuntimeError("a mistake of ours")

        async def final() -> None:
            tries["final"] += 1
            raise OperationFailure("bad", 2)

        assert await server(5).persist("write", passing) == "done"
        assert await server(5).persist("write", lockless) == "done"
        with pytest.raises(RuntimeError, match="of ours"):
            await server(5).persist("write", mistaken)
        with pytest.raises(StoreError):
            await server(5).persist("write", final)
        assert tries["final"] == 1
        with pytest.raises(StoreError, match=r"no answer within 0\.05 s to read"):
            await server(0.05).persist("read", lambda: asyncio.sleep(5))

    run(test())


def test_the_url_goes_before_the_settings() -> None:
    async def test() -> None:
        client = server().client(PoolSettings(size=1, max_overflow=0))
        assert client.options.pool_options.max_pool_size == 7
        assert client.write_concern.document == {"w": "majority", "j": True}
        await client.close()

    run(test())


def test_bodies_beyond_a_document_are_refused() -> None:
    row = Row("state", "k", 0, (), os.urandom(documents.BODY_BYTES + 1))
    with pytest.raises(StoreError, match="keep large data in files"):
        documents.put_row("r", row, 1)
