"""REST over a real server: every route of agent-lightning 0.3, statuses, error bodies, pages, long polls, odd input."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from http_store import Served, served

from agl_ray.types import InputError

LLM = {"resource_type": "llm", "endpoint": "http://127.0.0.1:1", "model": "tiny"}


class Rest:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._root = session, f"{url}/v1/agl/"

    async def ask(
        self, method: str, path: str, body: Any = None, raw: Any = None, **headers: str
    ) -> tuple[int, Any]:
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **headers} if data is not None else headers
        async with self._session.request(
            method, self._root + path, data=data, headers=sent
        ) as answer:
            content = await answer.read()
            assert answer.content_type == "application/json"
            return answer.status, json.loads(content)

    async def ok(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        got, answer = await self.ask(method, path, body)
        assert got == status, answer
        return answer

    async def error(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, str]:
        status, answer = await self.ask(method, path, body, **more)
        assert set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"type", "message"}
        assert answer["error"]["message"]
        return status, answer["error"]["type"]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def run(server: Served, flow: Callable[[Rest], Awaitable[None]]) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            await flow(Rest(session, server.url))

    asyncio.run(main())


def test_a_whole_flow(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        made = await rest.ok("POST", "resources", {"resources": {"main": LLM}}, 201)
        assert (made["version"], made["resources"]["main"]["model"]) == (1, "tiny")
        assert await rest.ok("GET", "resources/latest") == made
        new = {"input": {"big": 10**30, "text": "a\x00\u00e9"}, "mode": "train", "metadata": None}
        (rollout,) = await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": [new]}, 201)
        assert (rollout["status"], rollout["input"]) == ("queuing", new["input"])
        assert rollout["resources_id"] == made["resources_id"]
        (taken,) = await rest.ok("POST", "queues/rollouts/dequeue", {"worker_id": "w-1"})
        assert taken["rollout_id"] == rollout["rollout_id"]
        assert (taken["status"], taken["attempt"]["worker_id"]) == ("preparing", "w-1")
        assert await rest.ok("POST", "queues/rollouts/dequeue") == []
        at = f"rollouts/{rollout['rollout_id']}"
        attempt = f"{at}/attempts/{taken['attempt']['attempt_id']}"
        changed = await rest.ok("POST", attempt, {"status": "running", "metadata": {"a": 1}})
        assert changed["status"] == "running"
        assert await rest.ok("GET", f"{at}/attempts/latest") == await rest.ok("GET", attempt)
        ended = await rest.ok("POST", f"{attempt}/end", {"reason": "ok", "reward": 0.5})
        assert (ended["status"], ended["reward"]) == ("succeeded", 0.5)
        body = {"rollout_ids": [rollout["rollout_id"], "ro-none"], "timeout": 5}
        (done,) = await rest.ok("POST", "waits/rollouts", body)
        assert done["status"] == "succeeded"
        whole = await rest.ok("GET", at)
        assert whole["attempt"]["end_reason"] == "ok"
        started = await rest.ok("POST", "rollouts", {"input": "x", "worker_id": "w-2"}, 201)
        again = await rest.ok("POST", f"rollouts/{started['rollout_id']}/attempts", None, 201)
        assert again["attempt"]["sequence_id"] == 2
        page = await rest.ok("GET", f"rollouts/{started['rollout_id']}/attempts?sort_order=desc")
        assert [one["sequence_id"] for one in page["items"]] == [2, 1]
        (gone,) = await rest.ok("POST", "rollouts/cancel", {"rollout_ids": [started["rollout_id"]]})
        assert gone["status"] == "cancelled"
        worker = await rest.ok("POST", "workers/w-1", {"heartbeat_stats": {"cpu": 0.5}})
        assert worker == await rest.ok("GET", "workers/w-1")
        names = [one["worker_id"] for one in (await rest.ok("GET", "workers"))["items"]]
        assert names == ["w-1", "w-2"]
        assert (await rest.ok("GET", "health"))["status"] == "ok"
        assert (await rest.ok("GET", "statistics"))["total_rollouts"] == 2

    run(server, flow)


def test_a_request_id_makes_a_repeated_request_harmless(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        new = [{"input": number} for number in range(3)]
        await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": new}, 201)
        body = {"limit": 2, "worker_id": "w-r", "request_id": "take-1"}
        taken = await rest.ok("POST", "queues/rollouts/dequeue", body)
        assert len(taken) == 2
        assert await rest.ok("POST", "queues/rollouts/dequeue", body) == taken
        body = {"input": "x", "request_id": "start-1"}
        started = await rest.ok("POST", "rollouts", body, 201)
        assert await rest.ok("POST", "rollouts", body, 201) == started
        status, kind = await rest.error("POST", "rollouts", {**body, "input": "y"})
        assert (status, kind) == (409, "Conflict")
        at, body = f"rollouts/{started['rollout_id']}/attempts", {"request_id": "again-1"}
        more = await rest.ok("POST", at, body, 201)
        assert more["attempt"]["sequence_id"] == 2
        assert await rest.ok("POST", at, body, 201) == more
        for request_id, expected in (("rq-1", 400), ("a b", 422)):
            wrong = {"request_id": request_id}
            assert await rest.error("POST", "queues/rollouts/dequeue", wrong) == (
                expected,
                "InputError",
            )
        document = await rest.ok("GET", "openapi.json")
        for name in ("Dequeue", "StartRollout", "StartAttempt"):
            said = document["components"]["schemas"][name]["properties"]["request_id"]
            assert "nothing is done twice" in json.dumps(said)
        every = await rest.ok("GET", "rollouts?limit=-1")
        ids = [one["rollout_id"] for one in every["items"] if one["status"] != "cancelled"]
        await rest.ok("POST", "rollouts/cancel", {"rollout_ids": ids})

    run(server, flow)


def test_change_events_by_a_cursor_and_a_long_poll(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        end = await rest.ok("GET", "events")  # the server is shared: behind what other tests did
        while end["events"]:
            end = await rest.ok("GET", f"events?after={end['next']}")
        made = await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": [{"input": 1}]}, 201)
        rollout_id = made[0]["rollout_id"]
        end = await rest.ok("GET", f"events?after={end['next']}&limit=1")
        (event,) = end["events"]
        assert (event["kind"], event["key"], event["status"]) == ("rollout", rollout_id, "queuing")
        poll = asyncio.ensure_future(rest.ok("GET", f"events?after={end['next']}&wait_seconds=30"))
        await asyncio.sleep(0.05)
        await rest.ok("POST", "rollouts/cancel", {"rollout_ids": [rollout_id]})
        (event,) = (await asyncio.wait_for(poll, 25))["events"]
        assert (event["key"], event["status"]) == (rollout_id, "cancelled")
        assert (await rest.error("GET", "events?after=-1"))[0] == 422

    run(server, flow)


def test_spans(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        one = await rest.ok("POST", "rollouts", {"input": 1}, 201)
        key = {"rollout_id": one["rollout_id"], "attempt_id": one["attempt"]["attempt_id"]}
        span = {**key, "name": "step", "span_id": "s1", "attributes": {"a": [1]}, "start_time": 5.5}
        stored = await rest.ok("POST", "spans", span, 201)
        assert (stored["sequence_id"], stored["attributes"], stored["start_time"]) == (
            1,
            {"a": [1]},
            5.5,
        )
        assert await rest.ok("POST", "spans", span, 201) is None
        many = [{**key, "name": f"n{number}", "span_id": f"m{number}"} for number in range(5)]
        assert len(await rest.ok("POST", "spans", [span, *many], 201)) == 5
        assert await rest.ok("POST", "spans/next", key) == 7
        page = await rest.ok("GET", f"spans?rollout_id={key['rollout_id']}&limit=2")
        assert ([row["name"] for row in page["items"]], page["total"]) == (["step", "n0"], 6)
        search = {"rollout_id": key["rollout_id"], "name_contains": "n", "attempt_id": "latest"}
        assert (await rest.ok("POST", "spans/search", search))["total"] == 5
        unknown = {**span, "rollout_id": "ro-none"}
        assert await rest.error("POST", "spans", unknown) == (404, "NotFound")
        for odd in (
            {"start_time": 1e300},
            {"sequence_id": 0},
            {"status": "GOOD"},
            {"name": None},
            {"other": 1},
            {"attributes": []},
        ):
            assert await rest.error("POST", "spans", {**span, **odd}) == (422, "InputError")
        for extra in (
            {"prompt_ids": ["x"]},
            {"none": 1},
            {"reward": "x"},
            {"prompt_tokens": 2**40},
        ):
            odd = {**key, "name": "odd", "extra": extra}
            assert await rest.error("POST", "spans", odd) == (400, "InputError")

    run(server, flow)


def test_pages(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        rollouts = [{"input": number, "rollout_id": f"ro-page-{number:02}"} for number in range(7)]
        await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": rollouts}, 201)
        again = await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": rollouts}, 201)
        assert len(again) == 7
        search = {"rollout_id_contains": "ro-page-", "limit": 3, "sort_by": "rollout_id"}
        seen: list[int] = []
        sizes = []
        cursor = None
        while True:
            page = await rest.ok("POST", "rollouts/search", {**search, "cursor": cursor})
            assert page["total"] == 7
            seen += [one["input"] for one in page["items"]]
            sizes.append(len(page["items"]))
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert (seen, sizes) == ([*range(7)], [3, 3, 1])
        path = "rollouts?rollout_id_contains=ro-page-&limit=3&status_in=queuing&status_in=failed"
        first = await rest.ok("GET", path)
        second = await rest.ok("GET", f"{path}&cursor={first['next_cursor']}")
        assert [one["input"] for one in second["items"]] == [3, 4, 5]
        assert (await rest.ok("GET", f"{path}&offset=100"))["items"] == []
        assert (await rest.ok("GET", "rollouts?limit=0"))["items"] == []
        for wrong in ("x", "MC4=", first["next_cursor"] + "x", "%00", "\u00e9"):
            assert (await rest.error("GET", f"{path}&cursor={wrong}"))[0] in (400, 422)
        other = f"rollouts?limit=3&cursor={first['next_cursor']}"
        assert (await rest.error("GET", other))[0] in (400, 422)

    run(server, flow)


def test_pages_skip_nothing_when_earlier_ones_change() -> None:
    """Rollouts leave the filter while the pages are read; all orders; the total counts what matches now."""

    async def flow(rest: Rest) -> None:
        rollouts = [{"input": one, "rollout_id": f"ro-{one}", "mode": "val"} for one in range(9)]
        await rest.ok("POST", "queues/rollouts/enqueue", {"rollouts": rollouts}, 201)
        path = "rollouts?status_in=queuing&limit=3"
        page = await rest.ok("GET", path)
        await rest.ok("POST", "queues/rollouts/dequeue", {"limit": 4})
        seen = [one["input"] for one in page["items"]]
        while page["next_cursor"] is not None:
            page = await rest.ok("GET", f"{path}&cursor={page['next_cursor']}")
            seen += [one["input"] for one in page["items"]]
        assert (seen, page["total"]) == ([0, 1, 2, 4, 5, 6, 7, 8], 5)
        sorts = ("start_time", "end_time", "status", "mode", "resources_id", "rollout_id")
        for sort, order in itertools.product(sorts, ("asc", "desc")):
            path = f"rollouts?limit=4&sort_by={sort}&sort_order={order}"
            whole = (await rest.ok("GET", path.replace("limit=4", "limit=-1")))["items"]
            page = await rest.ok("GET", path)
            items = page["items"]
            while page["next_cursor"] is not None:
                page = await rest.ok("GET", f"{path}&cursor={page['next_cursor']}")
                items += page["items"]
            assert [one["input"] for one in items] == [one["input"] for one in whole]
            assert len(items) == 9
        first = await rest.ok("GET", "rollouts?limit=2&offset=3")
        path = f"rollouts?limit=2&offset=3&cursor={first['next_cursor']}"
        second = await rest.ok("GET", path)
        assert [one["input"] for one in (*first["items"], *second["items"])] == [3, 4, 5, 6]
        for number in range(5):
            await rest.ok("POST", f"resources/rs-{number}", {"resources": {}})
        page = await rest.ok("GET", "resources?limit=2&sort_order=desc")
        names = [one["resources_id"] for one in page["items"]]
        while page["next_cursor"] is not None:
            path = f"resources?limit=2&sort_order=desc&cursor={page['next_cursor']}"
            page = await rest.ok("GET", path)
            names += [one["resources_id"] for one in page["items"]]
        assert names == ["rs-4", "rs-3", "rs-2", "rs-1", "rs-0"]
        kinds = base64.urlsafe_b64decode((await rest.ok("GET", "rollouts?limit=1"))["next_cursor"])
        mark = json.loads(kinds)[2]
        for value in (
            ["x", "ro-1", mark],
            [None, "ro-none", mark],
            [True, "ro-1", mark],
            [1, 2, mark],
        ):
            odd = base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
            assert (await rest.error("GET", f"rollouts?limit=1&cursor={odd}"))[0] in (400, 404, 422)

    for journal in ("memory://", "sqlite"):
        with tempfile.TemporaryDirectory() as folder:
            url = journal if journal == "memory://" else f"sqlite:///{folder}/store.db"
            with served(url) as fresh:
                run(fresh, flow)


def test_long_polls_return_early(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        while await rest.ok("POST", "queues/rollouts/dequeue", {"limit": 1000}):
            pass
        started = time.monotonic()
        assert await rest.ok("POST", "queues/rollouts/dequeue", {"wait_seconds": 0.1}) == []
        taker = asyncio.ensure_future(
            rest.ok("POST", "queues/rollouts/dequeue", {"wait_seconds": 60})
        )
        await asyncio.sleep(0.1)
        body = {"rollouts": [{"input": "late"}]}
        (rollout,) = await rest.ok("POST", "queues/rollouts/enqueue", body, 201)
        (taken,) = await taker
        waiter = asyncio.ensure_future(
            rest.ok("POST", "waits/rollouts", {"rollout_ids": [rollout["rollout_id"]]})
        )
        attempt = f"rollouts/{rollout['rollout_id']}/attempts/{taken['attempt']['attempt_id']}"
        await rest.ok("POST", f"{attempt}/end", {"reason": "ok", "reward": 1})
        assert len(await waiter) == 1
        leaver = asyncio.ensure_future(
            rest.ok("POST", "queues/rollouts/dequeue", {"wait_seconds": 60})
        )
        while (await rest.ok("GET", "statistics"))["waiting_takers"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        leaver.cancel()
        await asyncio.wait([leaver])
        while (await rest.ok("GET", "statistics"))["waiting_takers"] == 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < 50

    run(server, flow)


def test_what_is_wrong_has_its_status(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        one = await rest.ok("POST", "rollouts", {"input": 1}, 201)
        at = f"rollouts/{one['rollout_id']}"
        attempt = f"{at}/attempts/{one['attempt']['attempt_id']}"
        await rest.ok("POST", f"{attempt}/end", {"reason": "ok", "reward": 1.0})
        enqueue = "queues/rollouts/enqueue"
        cases: list[tuple[tuple[int, str], str, str, Any]] = [
            ((404, "NotFound"), "GET", "nothing", None),
            ((405, "InputError"), "DELETE", "rollouts", None),
            ((404, "NotFound"), "GET", "rollouts/", None),
            ((404, "NotFound"), "GET", "rollouts/ro-none", None),
            ((404, "NotFound"), "GET", "workers/none", None),
            ((404, "NotFound"), "GET", "resources/none", None),
            ((404, "NotFound"), "GET", "rollouts/ro-none/attempts/latest", None),
            ((404, "NotFound"), "POST", "rollouts/ro-none", {"mode": "val"}),
            ((404, "NotFound"), "POST", enqueue, {"rollouts": [{"input": 1, "resources_id": "x"}]}),
            ((409, "Conflict"), "POST", f"{attempt}/end", {"reason": "ok", "reward": 2.0}),
            ((409, "Conflict"), "POST", f"{at}/attempts", {}),
            ((409, "Conflict"), "POST", at, {"status": "running"}),
            ((400, "InputError"), "GET", "rollouts?sort_by=nothing", None),
            ((422, "InputError"), "GET", "rollouts?limit=-2", None),
            ((422, "InputError"), "GET", "rollouts?limit=x", None),
            ((422, "InputError"), "GET", "rollouts?limit=" + "9" * 5000, None),
            ((422, "InputError"), "GET", "rollouts?limit=1&limit=2", None),
            ((422, "InputError"), "GET", "rollouts?other=1", None),
            ((422, "InputError"), "GET", "rollouts?rollout_id_contains=%00", None),
            ((422, "InputError"), "GET", "spans", None),
            ((422, "InputError"), "GET", "rollouts/%00", None),
            ((422, "InputError"), "POST", enqueue, {}),
            ((422, "InputError"), "POST", enqueue, {"rollouts": {}}),
            ((422, "InputError"), "POST", enqueue, {"rollouts": [{"input": 1, "mode": "x"}]}),
            ((422, "InputError"), "POST", enqueue, {"rollouts": [{"input": 1, "rollout_id": ""}]}),
            (
                (422, "InputError"),
                "POST",
                enqueue,
                {"rollouts": [{"input": 1, "config": {"max_attempts": 0}}]},
            ),
            ((422, "InputError"), "POST", "queues/rollouts/dequeue", {"wait_seconds": -1}),
            ((422, "InputError"), "POST", "queues/rollouts/dequeue", {"limit": 10**40}),
            ((422, "InputError"), "POST", f"{attempt}/end", {"reason": "good"}),
        ]
        for expected, method, path, body in cases:
            assert await rest.error(method, path, body) == expected, (path, body)
        for raw in (
            b"{",
            b"\xff",
            b"NaN",
            b'{"input": "\\ud800"}',
            b"[" * 100_000,
            b"1e999",
            b"[]",
        ):
            assert await rest.error("POST", "rollouts", raw=raw) == (422, "InputError"), raw[:20]
        kinds = {"content-type": "text/plain"}
        assert await rest.error("POST", "rollouts", {"input": 1}, **kinds) == (415, "InputError")

    run(server, flow)


def test_a_body_that_is_too_large() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    async def flow(rest: Rest) -> None:
        big = {"input": "x" * 20_000}
        assert await rest.error("POST", "rollouts", big) == (413, "InputError")
        assert await rest.error("POST", "rollouts", raw=parts()) == (413, "InputError")
        assert (await rest.ask("POST", "rollouts", {"input": "x" * 9_000}))[0] == 201

    with served(max_body=10_000) as small:
        run(small, flow)
        with pytest.raises(InputError, match="at most 10000 bytes"):
            asyncio.run(small.client().enqueue_rollout("x" * 20_000))


def test_the_document_names_every_route(server: Served) -> None:
    async def flow(rest: Rest) -> None:
        document = await rest.ok("GET", "openapi.json")
        routes = {
            f"{method.upper()} {path.removeprefix('/v1/agl/')}"
            for path, operations in document["paths"].items()
            for method in operations
        }
        upstream = """GET health|GET statistics|POST queues/rollouts/enqueue|POST queues/rollouts/dequeue|POST rollouts|GET rollouts
            |POST rollouts/search|GET rollouts/{rollout_id}|POST rollouts/{rollout_id}|POST rollouts/{rollout_id}/attempts
            |GET rollouts/{rollout_id}/attempts|POST rollouts/{rollout_id}/attempts/search|GET rollouts/{rollout_id}/attempts/latest
            |GET rollouts/{rollout_id}/attempts/{attempt_id}|POST rollouts/{rollout_id}/attempts/{attempt_id}|GET workers
            |POST workers/search|GET workers/{worker_id}|POST workers/{worker_id}|GET resources|POST resources|GET resources/latest
            |GET resources/{resources_id}|POST resources/{resources_id}|POST spans|GET spans|POST spans/search|POST spans/next
            |POST waits/rollouts"""
        assert {one.strip() for one in upstream.split("|")} <= routes
        assert "securitySchemes" not in document["components"]
        text = json.dumps(document)
        assert "agl-type:" not in text
        for reference in set(text.split('"$ref": "')[1:]):
            name = reference.split('"')[0].removeprefix("#/components/schemas/")
            assert name in document["components"]["schemas"]

    run(server, flow)


def test_the_key() -> None:
    async def flow(rest: Rest) -> None:
        assert await rest.error("GET", "statistics") == (401, "Unauthorized")
        assert await rest.error("GET", "openapi.json") == (401, "Unauthorized")
        assert (await rest.ask("GET", "health"))[0] == 200
        assert (await rest.ask("GET", "statistics", **{"x-api-key": "k"}))[0] == 200
        _, document = await rest.ask("GET", "openapi.json", authorization="Bearer k")
        assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}

    with served(api_key="k") as keyed:
        run(keyed, flow)
