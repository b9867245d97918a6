"""Reading a store beside its owner: of one moment, without changing anything, and with clear errors."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from agl_ray.ops.encryption import KEYS_VARIABLE, FieldCipher
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore, archive
from agl_ray.store.archive import Archive, open_archive
from agl_ray.store.journals.base import SpanRow
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.journals.sqlite_reading import SqliteReading
from agl_ray.types import EndReason, InputError, StoreError


async def rollout_ids(opened: Archive) -> list[str]:
    return [one.rollout.rollout_id async for page in opened.rollouts() for one in page]


def span(rollout_id: str, attempt_id: str, name: str):
    row = {"rollout_id": rollout_id, "attempt_id": attempt_id, "span_id": name, "name": name}
    row |= {"kind": "span", "start_ns": 1, "end_ns": 2, "status": "OK"}
    return span_batch([row])


def test_a_living_store_is_read_as_it_was_at_one_moment(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        first = await store.start_rollout({"i": 0})
        key = (first.rollout_id, first.attempt_id)
        await store.add_spans(*key, span(*key, "a"))
        async with open_archive(url) as opened:
            await store.enqueue_rollout({"i": 1})
            await store.add_spans(*key, span(*key, "b"))
            assert await rollout_ids(opened) == [first.rollout_id]
            (attempt,) = await opened.attempts([first.rollout_id])
            assert attempt.num_spans == 1
            totals = await opened.span_totals([first.rollout_id])
            tables = [table async for table in opened.spans(totals)]
            assert [table.column("name").to_pylist() for table in tables] == [["a"]]
            assert tables[0].column("sequence_id").to_pylist() == [1]
            again = archive.span_table(2 * await opened._journal.payloads([key]))
            assert again.column("name").num_chunks == 1  # else small spans weigh ten times more
        async with open_archive(url) as opened:
            assert len(await rollout_ids(opened)) == 2
        await store.end_attempt(*key, EndReason.OK, reward=1.0)  # the owner never noticed
        await core.close()

    asyncio.run(scenario())


def test_a_reader_leaves_no_trace(tmp_path: Path) -> None:
    """No file is left beside the store, no start is counted, and its lock is free."""

    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        await core.close()
        before = sorted(os.listdir(tmp_path))
        content = (tmp_path / "store.db").read_bytes()
        async with open_archive(url) as opened:
            assert await rollout_ids(opened) == []
            owner = await StoreCore.open(url)
            await owner.close()
        async with open_archive(url):
            pass
        assert sorted(os.listdir(tmp_path)) == before
        core = await StoreCore.open(url)
        assert (await LightningStore.local(core).statistics())["restarts"] == 2
        await core.close()
        assert content[:16] == b"SQLite format 3\0"

    asyncio.run(scenario())


def test_what_a_dead_owner_left_in_the_wal_is_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        made = await LightningStore.local(core).enqueue_rollout({"i": 0})
        left = tmp_path / "left"
        left.mkdir()
        for name in ("store.db", "store.db-wal"):
            (left / name).write_bytes((tmp_path / name).read_bytes())
        await core.close()
        async with open_archive(f"sqlite:///{left}/store.db") as opened:
            assert await rollout_ids(opened) == [made.rollout_id]

    asyncio.run(scenario())


def test_a_read_only_folder_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite cannot share a file there; whoever tests as root needs it said by SQLite."""

    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        made = await LightningStore.local(core).enqueue_rollout({"i": 0})
        await core.close()
        real = sqlite3.connect

        def connect(where: str, **options: object) -> sqlite3.Connection:
            if "mode=rw" in where:
                raise sqlite3.OperationalError("unable to open database file")
            return real(where, **options)

        monkeypatch.setattr(sqlite3, "connect", connect)
        async with open_archive(url) as opened:
            assert await rollout_ids(opened) == [made.rollout_id]

    asyncio.run(scenario())


def test_pages_are_walked_both_ways_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PAGE", 3)

    async def scenario() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        ids = []
        for i in range(10):
            made = await store.enqueue_rollout({"i": i}, mode="val" if i % 2 else "train")
            ids.append(made.rollout_id)
            await store.put_state(f"key {i}", bytes([i]))
        await store.cancel_rollouts(ids[:4])
        await core.close()
        async with open_archive(url) as opened:
            assert await rollout_ids(opened) == ids
            pages = [page async for page in opened.rollouts(newest_first=True, most=4)]
            assert [len(page) for page in pages] == [3, 1]
            found = [one.rollout.rollout_id for page in pages for one in page]
            assert found == ids[:5:-1]
            chosen = opened.rollouts(status_in=["cancelled"], mode="val")
            (page,) = [one async for one in chosen]
            assert [one.created for one in page] == [2, 4]
            values = [one async for page in opened.values() for one in page]
            assert values == [(f"key {i}", bytes([i])) for i in range(10)]
            assert opened.live.rollouts_by_status == {"cancelled": 4, "queuing": 6}
            assert await opened.ids_like(ids[0][:9]) == [ids[0]]

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["encrypted", "outside", "both"])
def test_wrapped_stores_are_read_with_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, FieldCipher.new_key())
    settings = JournalSettings(
        encryption="off" if how == "outside" else "aes-gcm",
        payload="journal" if how == "encrypted" else f"file://{tmp_path}/payloads",
    )
    url = f"sqlite:///{tmp_path}/store.db"
    name = "a" * 100_000  # large enough to rest outside

    async def look(rollout_id: str) -> None:
        async with open_archive(url, settings) as opened:
            found = await opened.rollout(rollout_id)
            assert found is not None
            assert found.input == {"secret": 1}
            totals = await opened.span_totals([rollout_id])
            (table,) = [one async for one in opened.spans(totals)]
            assert table.column("name").to_pylist() == [name]

    async def scenario() -> None:
        core = await StoreCore.open(url, settings=settings)
        store = LightningStore.local(core)
        made = await store.start_rollout({"secret": 1})
        key = (made.rollout_id, made.attempt_id)
        await store.add_spans(*key, span(*key, name))
        await look(made.rollout_id)  # beside its owner, who never notices
        await store.enqueue_rollout({"i": 1})
        await core.close()
        await look(made.rollout_id)
        with pytest.raises(StoreError, match="encrypted" if how != "outside" else "elsewhere"):
            async with open_archive(url):
                pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"x" * 5000), "not a database"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE a (b)"), "holds no store"),
    ],
)
def test_what_is_no_store_is_said(tmp_path: Path, make, match: str) -> None:
    make(tmp_path / "store.db")

    async def scenario() -> None:
        async with open_archive(f"sqlite:///{tmp_path}/store.db"):
            pass

    with pytest.raises(StoreError, match=match):
        asyncio.run(scenario())


def test_a_reader_refuses_to_write(tmp_path: Path) -> None:
    async def scenario() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        await core.close()
        journal = SqliteReading(tmp_path / "store.db")
        await journal.open()
        with pytest.raises(StoreError, match="reading alone"):
            await journal.write([], [SpanRow("b", ("r", "a"), 1, 1, b"")])
        with pytest.raises(StoreError):
            await journal.forget(["r"])
        await journal.close()

    asyncio.run(scenario())


def test_memory_cannot_be_read_from_elsewhere() -> None:
    async def scenario() -> None:
        async with open_archive("memory://"):
            pass

    with pytest.raises(InputError, match="own process"):
        asyncio.run(scenario())
