"""The store over HTTP: every command of the client, the same errors, lost connections, several loops, the key."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import time
import typing
from typing import Any

import aiohttp
import pytest
from http_store import Served, served

from agl_ray.spans import new_span_id, span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors import wire
from agl_ray.store.doors.http_transport import HttpTransport
from agl_ray.store.transport import StoreAway
from agl_ray.types import (
    LLM,
    AglError,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NotFound,
    RolloutConfig,
    RolloutStatus,
    StoreError,
    WaitTimeout,
)

MSGPACK = {"content-type": "application/msgpack"}
MODEL = LLM(endpoint="http://127.0.0.1:1", model="tiny")


def spans_of(rollout_id: str, attempt_id: str, number: int) -> Any:
    return span_batch(
        [
            {
                "rollout_id": rollout_id,
                "attempt_id": attempt_id,
                "span_id": new_span_id(),
                "name": "step",
                "kind": "span",
                "start_ns": 1,
                "end_ns": 2,
                "status": "OK",
                "attributes": {"number": one},
                "response_ids": [1, 2, 3],
            }
            for one in range(number)
        ]
    )


def test_every_public_coroutine_is_a_command() -> None:
    public = {
        name
        for name, _ in inspect.getmembers(StoreCore, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    assert set(wire.commands()) == public - {"open", "close"}
    blocking = {name for name, command in wire.commands().items() if command.blocks}
    assert {"dequeue", "wait_for_rollouts"} <= blocking


def test_a_whole_flow() -> None:
    async def flow(store: LightningStore) -> None:
        resources = await store.add_resources({"main": MODEL})
        assert resources.resources["main"] == MODEL
        asked = {
            "text": "caf\u00e9 \U0001f600 \x00",
            "big": 10**30,
            "less": -(10**30),
            "list": [1.5, None],
        }
        rollout = await store.enqueue_rollout(asked, mode="train", metadata={"a": [1, {}]})
        assert (rollout.input, rollout.metadata) == (asked, {"a": [1, {}]})
        assert rollout == await store.get_rollout_by_id(rollout.rollout_id)
        taken = await store.dequeue_rollout("w-1")
        assert taken is not None
        key = (taken.rollout_id, taken.attempt_id)
        assert await store.add_spans(*key, spans_of(*key, 3)) == [1, 2, 3]
        rows = await store.query_spans(taken.rollout_id)
        assert [one.attributes["number"] for one in rows] == [0, 1, 2]
        table = await store.read_spans([key])
        assert table.column("response_ids").to_pylist() == [[1, 2, 3]] * 3
        ended = await store.end_attempt(*key, EndReason.OK, reward=0.5, expected_spans=3)
        assert (ended.end_reason, ended.reward) == (EndReason.OK, 0.5)
        done = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
        assert done[0].status is RolloutStatus.SUCCEEDED
        await store.update_worker("w-1")
        await store.update_worker("w-1", {"load": 1})
        assert (await store.update_worker("w-1")).heartbeat_stats == {"load": 1}
        await store.put_state("position", b"\x00\xff")
        assert await store.get_state("position") == b"\x00\xff"
        assert (await store.statistics())["durable"] is False

    with served() as server:
        asyncio.run(flow(server.client()))


def test_updates_keep_their_types() -> None:
    async def update(store: LightningStore) -> None:
        rollout = await store.enqueue_rollout(1)
        config = RolloutConfig(max_attempts=3, retry_condition=("failed",))
        changed = await store.update_rollout(
            rollout.rollout_id, config=config, mode=None, input=[2]
        )
        assert (changed.config, changed.input) == (config, [2])
        gone = await store.update_rollout(rollout.rollout_id, status=RolloutStatus.CANCELLED)
        assert gone.status is RolloutStatus.CANCELLED

    with served() as server:
        asyncio.run(update(server.client()))


def test_errors_are_those_of_the_local_store() -> None:
    async def errors(store: LightningStore) -> list[tuple[type, str]]:
        started = await store.start_rollout({"a": 1})
        key = (started.rollout_id, started.attempt_id)
        await store.end_attempt(*key, EndReason.OK, reward=1.0)
        calls = [
            store.get_attempt("ro-none", "at-none"),
            store.end_attempt(*key, EndReason.OK, reward=2.0),
            store.end_attempt(*key, EndReason.OK, reward=float("nan")),
            store.enqueue_rollout(1, resources_id="rs-none"),
            store.enqueue_rollout({"set": {object()}}),
            store.add_spans("ro-none", "at-none", spans_of("ro-none", "at-none", 1)),
            store.add_spans("ro-none", "at-none", b"no stream"),
        ]
        found = []
        for call in calls:
            with pytest.raises(AglError) as raised:
                await call
            text = str(raised.value)
            for own in key:
                text = text.replace(own, "ID")
            found.append((type(raised.value), text.split(" at 0x")[0]))
        return found

    with served() as server:
        assert asyncio.run(errors(server.client())) == asyncio.run(errors(server.local()))


def test_every_error_type_crosses_unchanged() -> None:
    kinds = [AglError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = [kind for kind in kinds if kind.__module__ == AglError.__module__]
    errors: list[Exception] = [kind("a sentence") for kind in own if kind is not WaitTimeout]
    errors += [WaitTimeout("the moon", 2.5, "look up"), StoreAway("gone"), TypeError("t")]
    command = wire.commands()["ping"]
    for error in errors:
        with pytest.raises(type(error)) as raised:
            wire.decode_answer(command, wire.encode_error(error))
        assert type(raised.value) is type(error)
        assert str(raised.value) == str(error)
        assert vars(raised.value) == vars(error)
        assert pickle.loads(pickle.dumps(raised.value)).args == raised.value.args
    with pytest.raises(StoreError, match="ZeroDivisionError: by zero"):
        wire.decode_answer(command, wire.encode_error(ZeroDivisionError("by zero")))


class Flaky:
    """Between client and store: carries the first `losses` calls out and loses their answers, as a dropped connection does."""

    def __init__(self, port: int, losses: int) -> None:
        self.port, self.losses = port, losses

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = await reader.readexactly(size)
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
            back.write(head + body)
            answer = await there.readuntil(b"\r\n\r\n")
            size = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            answer += await there.readexactly(size)
            back.close()
            if self.losses > 0:
                self.losses -= 1
            else:
                writer.write(answer)
                await writer.drain()
        finally:
            writer.close()


def test_a_lost_answer_doubles_nothing() -> None:
    async def flow(url: str) -> None:
        flaky = Flaky(int(url.rpartition(":")[2]), 0)
        server = await asyncio.start_server(flaky, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        store = LightningStore.http(f"http://127.0.0.1:{port}")
        async with server:
            flaky.losses = 2
            await store.enqueue_many_rollouts(
                [EnqueueRolloutRequest(input=one) for one in range(3)]
            )
            flaky.losses = 2
            taken = await store.dequeue_many_rollouts(limit=2)
            flaky.losses = 1
            started = await store.start_rollout("x")
            flaky.losses = 1
            key = (taken[0].rollout_id, taken[0].attempt_id)
            assert await store.add_spans(*key, spans_of(*key, 2)) == [1, 2]
            flaky.losses = 1
            assert (await store.end_attempt(*key, EndReason.OK, reward=1.0)).num_spans == 2
            flaky.losses = 1
            assert (await store.add_resources({"main": MODEL})).version == 1
            flaky.losses = 0
            rollouts = await store.query_rollouts()
            assert sorted(str(one.input) for one in rollouts) == ["0", "1", "2", "x"]
            assert len(await store.query_attempts(started.rollout_id)) == 1
            waiting = await store.query_rollouts(status_in=[RolloutStatus.QUEUING])
            assert [one.input for one in waiting] == [2]
            assert {one.input for one in taken} == {0, 1}

    with served() as server:
        asyncio.run(flow(server.url))


def test_waits_return_early_and_a_caller_who_leaves_is_given_nothing() -> None:
    async def flow(store: LightningStore) -> None:
        started = time.monotonic()
        assert await store.dequeue_rollout("w-1", wait_seconds=0.2) is None
        assert time.monotonic() - started < 25
        leaver = asyncio.ensure_future(store.dequeue_rollout("w-2", wait_seconds=30))
        while (await store.statistics())["waiting_takers"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        leaver.cancel()
        await asyncio.wait([leaver])
        while (await store.statistics())["waiting_takers"] == 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stayer = asyncio.ensure_future(store.dequeue_rollout("w-3", wait_seconds=30))
        rollout = await store.enqueue_rollout("work")
        taken = await stayer
        assert taken is not None
        assert (taken.rollout_id, taken.attempt.worker_id) == (rollout.rollout_id, "w-3")
        waiter = asyncio.ensure_future(
            store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=None)
        )
        await store.end_attempt(taken.rollout_id, taken.attempt_id, EndReason.OK, reward=1.0)
        assert [one.rollout_id for one in await waiter] == [rollout.rollout_id]
        assert time.monotonic() - started < 25

    with served() as server:
        asyncio.run(flow(server.client()))


@pytest.mark.filterwarnings("error")
def test_one_client_on_several_loops() -> None:
    """Each loop has its own connections and takes them with it."""

    async def use(store: LightningStore) -> list[Any]:
        return await asyncio.gather(*(store.enqueue_rollout(one) for one in range(4)))

    with served() as server:
        store = server.client()
        transport = typing.cast(HttpTransport, store.transport)
        for _ in range(3):
            asyncio.run(use(store))
            assert len(transport._sessions) == 1
            (session,) = [
                one._opened.result() for one in transport._sessions.values() if one._opened
            ]
            assert session.closed
        again = pickle.loads(pickle.dumps(store))
        assert len(asyncio.run(again.query_rollouts())) == 12


def test_close_ends_the_connections_and_no_store() -> None:
    async def flow(store: LightningStore) -> None:
        await store.ping()
        with pytest.raises(Conflict, match="whoever started it"):
            await store.shutdown()
        await store.transport.close()
        assert await store.ping() > 0

    with served() as server:
        asyncio.run(flow(server.client()))


def test_the_key() -> None:
    async def with_key(url: str, headers: dict[str, str]) -> int:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/agl/call/ping", headers=headers) as answer,
        ):
            return answer.status

    with served(api_key="s3cret") as server:
        assert asyncio.run(server.client("s3cret").ping()) > 0
        for wrong in (None, "", "s3cre", "s3cret2", "\u20ac"):
            with pytest.raises(InputError, match="API key"):
                asyncio.run(server.client(wrong).ping())
        assert asyncio.run(with_key(server.url, {"x-api-key": "s3cret"})) == 400
        assert asyncio.run(with_key(server.url, {"authorization": "bearer s3cret"})) == 400
        for headers in (
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
            {"x-api-key": ""},
        ):
            assert asyncio.run(with_key(server.url, headers)) == 401


def test_a_web_page_of_another_site_is_refused_where_there_is_no_key() -> None:
    """What a browser lets any page send to this machine: a body of plain text, an empty one, its own origin told."""

    async def post(url: str, path: str, headers: dict[str, str]) -> int:
        body = wire.encode_call("put_state", ("key", b"x"), 1.0)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/agl/{path}", data=body, headers=headers) as answer,
        ):
            return answer.status

    async def flow(server: Served) -> None:
        call = "call/put_state"
        assert await post(server.url, call, {"content-type": "text/plain"}) == 400
        other = {"origin": "http://example.org"}
        assert await post(server.url, call, MSGPACK | other) == 403
        assert await post(server.url, "queues/rollouts/dequeue", other) == 403
        assert await server.client().get_state("key") is None
        assert await post(server.url, call, MSGPACK | {"origin": server.url}) == 200
        assert await server.client().get_state("key") == b"x"

    with served() as server:
        asyncio.run(flow(server))


def test_what_is_no_store() -> None:
    for wrong in ("", "127.0.0.1:80", "ftp://x", "http://", "sqlite:///x"):
        with pytest.raises(InputError, match="expected http://host:port"):
            LightningStore.http(wrong)
    with (
        served() as server,
        pytest.raises(StoreError, match="expected the door of a LightningStore"),
    ):
        asyncio.run(LightningStore.http(server.url + "/other").ping())
    with pytest.raises(WaitTimeout, match="the store to come back"):
        asyncio.run(LightningStore.http(server.url, away_seconds=0.2).ping())


def test_bad_bodies_are_answers() -> None:
    async def post(url: str, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        import msgspec

        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/agl/call/{name}", data=body, headers=MSGPACK) as answer,
        ):
            return answer.status, msgspec.msgpack.decode(await answer.read())["error"]

    async def check(url: str) -> None:
        assert (await post(url, "nothing", b""))[0] == 404
        assert (await post(url, "close", b""))[0] == 404
        assert (await post(url, "_do", b""))[0] == 404
        bodies = [b"", b"\xc1", b"{}", wire.encode_call("ping", (1,), 1.0)]
        bodies += [wire.encode_call("ping", (), 0.0), wire.encode_call("ping", (), float("nan"))]
        bodies += [b"\x82\xa4args" + b"\x91" * 20000 + b"\xa7seconds\x01"]
        for body in bodies:
            status, error = await post(url, "ping", body)
            assert (status, error["type"]) == (400, "InputError"), error
        status, error = await post(url, "get_attempt", wire.encode_call("x", (1, "b"), 1.0))
        assert status == 400
        assert "str" in error["text"]

    with served() as server:
        asyncio.run(check(server.url))


def test_many_commands_in_one_request() -> None:
    """Each has its own result or error; what cannot be read is an error of its own."""

    async def flow(store: LightningStore) -> None:
        transport = typing.cast(HttpTransport, store.transport)
        rollout = await store.enqueue_rollout("x")
        commands: list[tuple[str, tuple[Any, ...]]] = [
            ("get_rollout", (rollout.rollout_id,)),
            ("get_attempt", ("ro-none", "at-none")),
            ("get_rollout", ("ro-none",)),
            ("get_rollout", (1,)),
            ("put_state", ("key", b"\x00")),
        ]
        found, missing, nothing, unread, none = await transport.call_many(commands, seconds=5)
        assert (found, nothing, none) == (rollout, None, None)
        assert isinstance(missing, NotFound)
        assert isinstance(unread, InputError)
        assert await store.get_state("key") == b"\x00"
        both = await asyncio.gather(
            *(store.enqueue_rollout(one) for one in range(50)),
            *(store.get_attempt(rollout.rollout_id, f"at-{one}") for one in range(50)),
            return_exceptions=True,
        )
        assert [one.input for one in both[:50] if not isinstance(one, BaseException)] == [
            *range(50)
        ]
        assert [f"at-{one}" in str(error) for one, error in enumerate(both[50:])] == [True] * 50

    with served() as server:
        asyncio.run(flow(server.client()))
