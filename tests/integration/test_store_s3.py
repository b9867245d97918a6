"""Payloads in an S3 bucket, over the wire: Arrow's S3 client against moto's server, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from journal_contract import JournalContract, Storage

from agl_ray.store.journals.base import Journal, Row, SpanRow
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.outside import Outside
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import ConfigError, StoreError

pytestmark = pytest.mark.slow

START = 180.0  # seconds; it imports all of boto3, on a machine that may be busy
KEY = ("ro-1", "at-1")
ROLLOUT = Row("rollout", "ro-1", 0, (1, "running", None, 1.0, None, None), b"{}")
SPAN = SpanRow("a", KEY, 1, 1, b"x" * 50_000)


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(URI of a fresh bucket, the server's process)."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    kept = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        client = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1"
        )
        client.create_bucket(Bucket="spans")
        where = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield f"s3://spans/runs?{where}", server
    finally:
        server.kill()
        server.wait()
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not answer within {START:g} s")


class TestOutsideS3(JournalContract):
    @pytest.fixture
    def storage(self, bucket: tuple[str, subprocess.Popen[bytes]]) -> Storage:
        def fresh() -> Callable[[], Journal]:
            inner = MemoryJournal()
            return lambda: Outside(inner, bucket[0], over_kib=0)

        return Storage(fresh, examples=5, keeps_last_event=False)


def test_a_run_in_a_file_has_its_payloads_in_the_bucket(
    bucket: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    url, settings = f"sqlite:///{tmp_path}/store.db", JournalSettings(payload=bucket[0])

    async def test() -> None:
        journal = open_journal(url, settings)
        await open_checked(journal)
        await journal.write([ROLLOUT], [SPAN])
        await journal.close()
        assert b"x" * 1000 not in (tmp_path / "store.db").read_bytes()
        again = open_journal(url, settings)
        await open_checked(again, must_exist=True)
        assert await again.payloads([KEY]) == [SPAN]
        await again.close()

    asyncio.run(test())


def test_what_cannot_be_used_is_said() -> None:
    where = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(ConfigError, match=r"expected a URI without a secret key .* s3://me:\*\*\*"):
        Outside(MemoryJournal(), f"s3://me:secret@spans/runs?{where}")


def test_a_bucket_that_is_gone_acknowledges_nothing(
    bucket: tuple[str, subprocess.Popen[bytes]],
) -> None:
    """The last test: it ends the server."""
    uri, server = bucket

    async def test() -> None:
        inner = MemoryJournal()
        journal = Outside(inner, uri)
        await open_checked(journal)
        server.kill()
        server.wait()
        with pytest.raises(StoreError, match="cannot write it"):
            await journal.write([ROLLOUT], [SPAN])
        assert await inner.rows("rollout", ["ro-1"]) == []
        await journal.close()

    asyncio.run(test())
