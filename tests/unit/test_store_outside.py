"""Payloads outside the journal: where they rest, and what a crash, a missing file or a foreign folder do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_contract import JournalContract, Storage

from agl_ray.ops.encryption import FieldCipher
from agl_ray.store.journals.base import EventRow, Journal, Row, SpanRow
from agl_ray.store.journals.encrypted import Encrypted
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.outside import Outside
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.types import ConfigError, StoreError

KEY = ("ro-1", "at-1")
ROLLOUT = Row("rollout", "ro-1", 0, (1, "running", None, 1.0, None, None), b"{}")


def large(batch: str, first: int = 1, key: tuple[str, str] = KEY, size: int = 50_000) -> SpanRow:
    return SpanRow(batch, key, first, 1, (batch.encode() * size)[:size])


def small(batch: str, first: int = 1, key: tuple[str, str] = KEY) -> SpanRow:
    return SpanRow(batch, key, first, 1, batch.encode() * 10)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.spans"))


class Breaking(MemoryJournal):
    """Dies in the middle of one of its calls: `at` counts writes and forgets down; `after` says whether it was carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.after = -1, False

    async def _call(self, work: Coroutine[Any, Any, None]) -> None:
        self.at -= 1
        if self.at == -1 and not self.after:
            work.close()
            raise StoreError("the power went")
        await work
        if self.at == -1:
            raise StoreError("the power went, later")

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        await self._call(super().write(rows, spans, events))

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        await self._call(super().forget(rollout_ids))


class TestOutsideMemory(JournalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        def fresh() -> Callable[[], Journal]:
            inner = MemoryJournal()
            return lambda: Outside(inner, tmp_path.as_uri(), over_kib=0)

        return Storage(fresh, examples=25, keeps_last_event=False)


class TestEncryptedOutsideSqlite(JournalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        numbers, key = itertools.count(), FieldCipher.new_key()

        def fresh() -> Callable[[], Journal]:
            path = tmp_path / f"{next(numbers)}.db"
            uri = (tmp_path / "payloads").as_uri()
            return lambda: Encrypted(Outside(SqliteJournal(path), uri, over_kib=0), "fernet", [key])

        limits = {"any_id": False, "keeps_last_event": False}  # of SQLite
        return Storage(fresh, examples=15, exact_sizes=False, **limits)


def test_large_payloads_are_files_and_small_ones_are_not(tmp_path: Path) -> None:
    inner = MemoryJournal()
    spans = [large("a", 1), small("b", 2), large("c", 3)]

    async def test() -> None:
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        await journal.write([ROLLOUT], spans)
        await journal.write([], [small("d", 4)])
        assert await journal.payloads([KEY]) == [*spans, small("d", 4)]
        assert await journal.find_batch(KEY, "c") == (3, 1)
        [totals] = await journal.span_totals(["ro-1"])
        assert totals == (KEY, 4, 4, 100_020)
        await journal.close()
        again = Outside(inner, tmp_path.as_uri())
        live = await open_checked(again, must_exist=True)
        assert (live.num_spans, live.span_bytes) == (4, 100_020)
        assert await again.payloads([KEY]) == [*spans, small("d", 4)]

    run(test())
    [name] = files(tmp_path)
    assert (tmp_path / name).read_bytes() == spans[0].payload + spans[2].payload
    assert sum(len(one.payload) for many in inner._spans["ro-1"].values() for one in many) < 300


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.integers(0, 3000), max_size=5), max_size=5))
def test_what_is_written_is_read(tmp_path: Path, groups: list[list[int]]) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        journal = Outside(inner, tmp_path.as_uri(), over_kib=1)
        await open_checked(journal)
        written: list[SpanRow] = []
        for sizes in groups:
            rows = [
                SpanRow(f"b{first}", KEY, first, 1, bytes([first]) * size)
                for first, size in enumerate(sizes, len(written) + 1)
            ]
            await journal.write([], rows)
            written += rows
        assert await journal.payloads([KEY]) == written
        live = await journal.open()
        assert live.span_bytes == sum(len(row.payload) for row in written)
        await journal.close()

    run(test())


def test_a_crash_between_file_and_commit_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        inner = Breaking()
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        await journal.write([], [large("a")])
        inner.at = 0
        with pytest.raises(StoreError, match="the power went"):
            await journal.write([], [large("b", 2)])
        with pytest.raises(StoreError, match="an earlier write failed"):
            await journal.write([], [large("c", 2)])
        assert len(files(tmp_path)) == 2
        again = Outside(inner, tmp_path.as_uri())
        await open_checked(again)
        assert len(files(tmp_path)) == 1
        assert await again.payloads([KEY]) == [large("a")]
        await again.write([], [large("b", 2)])
        assert await again.payloads([KEY]) == [large("a"), large("b", 2)]

    run(test())


def test_a_commit_whose_answer_was_lost_keeps_its_file(tmp_path: Path) -> None:
    async def test() -> None:
        inner = Breaking()
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        inner.at, inner.after = 0, True
        with pytest.raises(StoreError, match="later"):
            await journal.write([], [large("a")])
        again = Outside(inner, tmp_path.as_uri())
        await open_checked(again)
        assert await again.payloads([KEY]) == [large("a")]

    run(test())


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    """Two runs under one URI, one of them in the middle of a commit, while the other opens again and again."""

    async def test() -> None:
        one, other = Breaking(), MemoryJournal()
        mine = Outside(one, tmp_path.as_uri())
        await open_checked(mine)
        one.at = 0
        with pytest.raises(StoreError):
            await mine.write([], [large("a")])
        stranger = tmp_path / "notes.spans"
        stranger.write_text("not ours")
        for place in range(3):
            theirs = Outside(other, tmp_path.as_uri())
            await open_checked(theirs)
            await theirs.write([], [large(f"b{place}", place + 1)])
            await theirs.close()
        assert len(files(tmp_path)) == 5
        assert stranger.exists()

    run(test())


def test_forgotten_rollouts_take_their_files_along(tmp_path: Path) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        other = ("ro-2", "at-1")
        await journal.write([ROLLOUT], [large("a"), large("x", 1, other)])
        await journal.write([], [large("b", 2), small("c", 3)])
        await journal.forget(["ro-1"])
        assert len(files(tmp_path)) == 1
        assert await journal.payloads([KEY, other]) == [large("x", 1, other)]
        assert await journal.rows("rollout", ["ro-1"]) == []
        await journal.forget(["ro-2", "ro-3"])
        assert files(tmp_path) == []
        live = await Outside(inner, tmp_path.as_uri()).open()
        assert (live.num_spans, live.span_bytes) == (0, 0)

    run(test())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_forget_that_dies_is_finished_or_undone(tmp_path: Path, at: int, after: bool) -> None:
    async def test() -> None:
        inner = Breaking()
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        other = ("ro-2", "at-1")
        await journal.write([], [large("a"), large("x", 1, other)])
        await journal.write([], [large("b", 2)])
        inner.at, inner.after = at, after
        with pytest.raises(StoreError, match="the power went"):
            await journal.forget(["ro-1"])
        again = Outside(inner, tmp_path.as_uri())
        live = await open_checked(again)
        gone = (at, after) >= (1, True)
        there = (
            [large("x", 1, other)] if gone else [large("a"), large("b", 2), large("x", 1, other)]
        )
        assert await again.payloads([KEY, other]) == there
        assert len(files(tmp_path)) == (1 if gone else 2)
        live = await again.open()
        assert live.span_bytes == 50_000 * len(there)
        await again.forget(["ro-1", "ro-2"])
        assert files(tmp_path) == []

    run(test())


def test_it_can_be_read_beside_its_owner(tmp_path: Path) -> None:
    async def test() -> None:
        inner = Breaking()
        owner = Outside(inner, tmp_path.as_uri())
        await open_checked(owner)
        await owner.write([ROLLOUT], [large("a")])
        inner.at = 0
        with pytest.raises(StoreError, match="the power went"):
            await owner.write([], [large("b", 2)])  # its file may be one of a commit under way
        beside = Outside(inner, tmp_path.as_uri(), reading=True)
        live = await open_checked(beside)
        assert live.span_bytes == 50_000
        assert await beside.payloads([KEY]) == [large("a")]
        for call in (beside.write([ROLLOUT], []), beside.forget(["ro-1"])):
            with pytest.raises(StoreError, match="for reading alone"):
                await call
        assert len(files(tmp_path)) == 2

    run(test())


def test_missing_short_and_damaged_files_are_named(tmp_path: Path) -> None:
    async def test() -> None:
        journal = Outside(MemoryJournal(), tmp_path.as_uri())
        await open_checked(journal)
        await journal.write([], [large("a")])
        [name] = files(tmp_path)
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=f"{name}: expected 50000 bytes at 0, got 49999"):
            await journal.payloads([KEY])
        path.write_bytes(whole[:-1] + b"!")
        with pytest.raises(StoreError, match=f"{name}: .* damaged"):
            await journal.payloads([KEY])
        path.unlink()
        with pytest.raises(StoreError, match=f"{name}: it is missing"):
            await journal.payloads([KEY])

    run(test())


def test_a_folder_that_is_gone_is_noticed_at_open(tmp_path: Path) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        journal = Outside(inner, (tmp_path / "here").as_uri())
        await open_checked(journal)
        await journal.write([], [large("a")])
        await journal.close()
        with pytest.raises(StoreError, match=r"is not there; set store\.payload to where"):
            await open_checked(Outside(inner, (tmp_path / "there").as_uri()))
        (tmp_path / "here").rename(tmp_path / "there")
        moved = Outside(inner, (tmp_path / "there").as_uri())
        await open_checked(moved)
        assert await moved.payloads([KEY]) == [large("a")]

    run(test())


def test_wrong_openings_are_refused(tmp_path: Path) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        journal = Outside(inner, tmp_path.as_uri())
        await open_checked(journal)
        await journal.write([ROLLOUT], [large("a")])
        with pytest.raises(StoreError, match="payloads are files elsewhere"):
            await open_checked(inner)
        plain = MemoryJournal()
        await open_checked(plain)
        await plain.write([ROLLOUT], [])
        with pytest.raises(StoreError, match="written with its payloads inside"):
            await open_checked(Outside(plain, tmp_path.as_uri()))
        for uri in ("nonsense", "ftp://x/y", "file://relative"):
            with pytest.raises(ConfigError, match="expected `journal` or a URI"):
                await open_checked(Outside(MemoryJournal(), uri))

    run(test())


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    async def test() -> None:
        journal = Outside(MemoryJournal(), (tmp_path / "file").as_uri())
        await open_checked(journal)
        with pytest.raises(StoreError, match="cannot write it"):
            await journal.write([], [large("a")])

    run(test())


def test_encrypted_payloads_are_encrypted_in_the_files(tmp_path: Path) -> None:
    key = FieldCipher.new_key()
    one = large("a")._replace(payload=b"secret" * 10_000)
    two = small("b", 2)._replace(payload=b"hidden")

    def stack() -> Journal:
        inner = SqliteJournal(tmp_path / "store.db")
        return Encrypted(Outside(inner, (tmp_path / "payloads").as_uri()), "aes-gcm", [key])

    async def test() -> None:
        journal = stack()
        await open_checked(journal)
        await journal.write([ROLLOUT], [one, two])
        await journal.close()
        again = stack()
        await open_checked(again)
        assert await again.payloads([KEY]) == [one, two]
        await again.close()
        for bare in (
            SqliteJournal(tmp_path / "store.db"),
            Outside(SqliteJournal(tmp_path / "store.db"), (tmp_path / "payloads").as_uri()),
            Encrypted(SqliteJournal(tmp_path / "store.db"), "aes-gcm", [key]),
        ):
            with pytest.raises(StoreError, match="set store"):
                await open_checked(bare)

    run(test())
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"secret" not in stored
    assert b"hidden" not in stored


def test_many_payloads_of_many_files_are_read_together(tmp_path: Path) -> None:
    async def test() -> None:
        journal = Outside(MemoryJournal(), tmp_path.as_uri())
        await open_checked(journal)
        rows = [large(f"b{first:02d}", first, size=20_000 + first) for first in range(1, 61)]
        for start in range(0, 60, 6):
            await journal.write([], rows[start : start + 6])
        assert await journal.payloads([KEY]) == rows
        assert len(files(tmp_path)) == 10

    run(test())
