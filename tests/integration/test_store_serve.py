"""`agl-ray store serve` as a process of its own: durable, ended in order by signals, clear about what is wrong."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agl_ray.cli.store_serve import check_entry, listening, serve
from agl_ray.store import LightningStore
from agl_ray.types import EnqueueRolloutRequest, InputError, WaitTimeout

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from agl_ray.cli.store_serve import serve
from agl_ray.types import AglError
try:
    serve(sys.argv[1], port=int(sys.argv[2]), api_key=sys.argv[3] if len(sys.argv) > 3 else None)
except AglError as error:
    print(f"agl-ray: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@contextmanager
def program(url: str, port: int = 0, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address once it serves)"""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, str(port), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        first = process.stdout.readline()
        yield process, next((word.strip(",") for word in first.split() if "http" in word), "")
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """A call that waits does not hold it up, the exit code is 0, and everything is there the next time."""
    url = f"sqlite:///{tmp_path}/store.db"
    with program(url) as (process, address):
        store = LightningStore.http(address, away_seconds=0.5)
        rollout = asyncio.run(store.enqueue_rollout({"a": 1}))

        async def wait_while_it_ends() -> None:
            waiting = asyncio.ensure_future(
                store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=600)
            )
            await store.ping()
            process.send_signal(number)
            with pytest.raises(WaitTimeout, match="the store to come back"):
                await waiting

        started = time.monotonic()
        asyncio.run(wait_while_it_ends())
        assert process.wait(120) == 0
        assert time.monotonic() - started < 240  # long before that call would have ended
        assert process.stdout is not None
        assert "its journal is flushed" in process.stdout.read()
    with program(url) as (_, address):
        again = LightningStore.http(address)
        assert asyncio.run(again.get_rollout_by_id(rollout.rollout_id)) == rollout


def test_a_client_goes_on_when_the_store_was_killed(tmp_path: Path) -> None:
    """kill -9 under a stream of calls, the store comes back at the same port: nothing is lost, nothing twice."""
    url = f"sqlite:///{tmp_path}/store.db"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def enqueue(store: LightningStore, name: str) -> None:
        for number in range(30):
            requests = [EnqueueRolloutRequest(input=f"{name}-{number}-{one}") for one in range(3)]
            await store.enqueue_many_rollouts(requests)

    async def stream(store: LightningStore, process: subprocess.Popen[str]) -> None:
        work = [asyncio.ensure_future(enqueue(store, name)) for name in "abcd"]
        while len(await store.query_rollouts(limit=30)) < 30:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        process.kill()
        await asyncio.to_thread(process.wait)
        with await asyncio.to_thread(next_life.__enter__):
            await asyncio.gather(*work)
            inputs = [one.input for one in await store.query_rollouts()]
            assert len(inputs) == len(set(inputs)) == 360

    class NextLife:
        def __enter__(self) -> NextLife:
            self._made = program(url, port)
            self._made.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._made.__exit__(None, None, None)

    next_life = NextLife()
    with program(url, port) as (process, address):
        asyncio.run(stream(LightningStore.http(address), process))


def test_the_key_is_asked_for() -> None:
    with program("memory://", 0, "s3cret") as (_, address):
        assert asyncio.run(LightningStore.http(address, "s3cret").ping()) > 0
        with pytest.raises(InputError, match="API key"):
            asyncio.run(LightningStore.http(address).ping())


def test_what_is_wrong_is_exit_code_2(tmp_path: Path) -> None:
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"this is no database" * 100)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ("memory://", port, f"cannot listen at 127.0.0.1:{port}"),
            (f"sqlite:///{bad}", 0, "bad.db"),
            (f"sqlite:///{bad}/x.db", 0, "x.db"),
            ("redis://x", 0, "store.url"),
        ]
        for url, number, words in cases:
            with program(url, number) as (process, _):
                assert process.wait(60) == 2, url
                assert process.stderr is not None
                said = process.stderr.read()
                assert words in said
                assert "Traceback" not in said


def test_the_store_is_open_only_to_this_machine_unless_said() -> None:
    check_entry("127.0.0.1", None, False)
    check_entry("::1", None, False)
    check_entry("localhost", None, False)
    check_entry("0.0.0.0", "key", False)
    check_entry("0.0.0.0", None, True)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(InputError, match="--open"):
            check_entry(host, None, False)
    with pytest.raises(InputError, match="empty"):
        check_entry("127.0.0.1", "", False)
    with pytest.raises(InputError, match="cannot listen"):
        serve("memory://", port=70000)


def test_an_answer_is_not_held_back() -> None:
    """Without the protocol's name asyncio leaves Nagle's algorithm on, and every small answer takes 40 ms."""
    with program("memory://") as (_, address):

        async def pings(store: LightningStore) -> list[float]:
            took = []
            for _ in range(51):
                started = time.monotonic()
                await store.ping()
                took.append(time.monotonic() - started)
            return took

        took = asyncio.run(pings(LightningStore.http(address)))
        # The machine may stand still between any two; held back, none but the first would be this quick.
        assert sorted(took)[len(took) // 4] < 0.03
    with listening() as door:
        assert door.proto == socket.IPPROTO_TCP
