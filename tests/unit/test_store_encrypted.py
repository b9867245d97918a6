"""The encrypted journal: nothing readable inside, keys that change, and every wrong opening refused with what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from agl_ray.ops.encryption import Algorithm, FieldCipher
from agl_ray.store.journals import encrypted
from agl_ray.store.journals.base import EventRow, Journal, Query, Row, SpanRow
from agl_ray.store.journals.encrypted import Encrypted
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.types import ConfigError, StoreError

OLD, NEW, OTHER = (FieldCipher.new_key() for _ in range(3))
SECRET = b'{"input": "the patient is forty-two"}'
both = pytest.mark.parametrize("algorithm", ["aes-gcm", "fernet"])

ROLLOUT = Row("rollout", "ro-1", 1, (1, "queuing", "train", 1.0, None, None), SECRET)
ATTEMPT = Row("attempt", "ro-1/at-1", 1, ("ro-1", "at-1", "running", None, "w", 1.0, None), SECRET)
RESOURCES = Row("resources", "rs-1", 1, (1, 1.0, 1.0), SECRET)
WORKER = Row("worker", "w", 0, ("busy",), SECRET)
STATE = Row("state", "trainer", 0, (), SECRET)
ROWS = [ROLLOUT, ATTEMPT, RESOURCES, WORKER, STATE]
SPANS = [
    SpanRow("b1", ("ro-1", "at-1"), 1, 2, SECRET * 3),
    SpanRow("b2", ("ro-1", "at-1"), 3, 1, SECRET),
]
EVENTS = [EventRow(1, SECRET), EventRow(2, SECRET)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


async def filled(
    inner: Journal, algorithm: Algorithm = "aes-gcm", keys: tuple[str, ...] = (OLD,)
) -> None:
    journal = Encrypted(inner, algorithm, keys)
    await open_checked(journal)
    await journal.write(ROWS, SPANS, EVENTS)
    await journal.close()


async def has_everything(journal: Journal) -> None:
    """As written by `filled`, through every way of reading."""
    assert await journal.rows("rollout", ["ro-1", "no"]) == [ROLLOUT]
    assert await journal.attempts_of(["ro-1"]) == [ATTEMPT]
    for row in ROWS:
        assert (await journal.query(Query(row.kind))).rows == [row]
        assert await journal.keys(row.kind, "") == [row.key]
    assert await journal.payloads([("ro-1", "at-1")]) == SPANS
    assert await journal.events(0, 9) == EVENTS
    assert await journal.find_batch(("ro-1", "at-1"), "b2") == (3, 1)


@both
def test_nothing_readable_rests_inside(tmp_path: Path, algorithm: Algorithm) -> None:
    async def test() -> None:
        await filled(SqliteJournal(tmp_path / "store.db"), algorithm)
        journal = Encrypted(SqliteJournal(tmp_path / "store.db"), algorithm, [OLD])
        live = await open_checked(journal, must_exist=True)
        assert (live.open_attempts, live.workers, live.latest_resources) == (
            [ATTEMPT],
            [WORKER],
            RESOURCES,
        )
        await has_everything(journal)
        await journal.close()

    run(test())
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"forty-two" not in stored
    assert b"patient" not in stored
    assert OLD.encode() not in stored
    assert b"ro-1" in stored, "ids stay readable, as the docstring says"


@both
def test_keys_change(algorithm: Algorithm) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await filled(inner, algorithm)
        journal = Encrypted(inner, algorithm, [NEW, OLD])  # the new key first, once ...
        await open_checked(journal)
        newer = SpanRow("b3", ("ro-1", "at-1"), 4, 1, SECRET)
        await journal.write([], [newer])
        await journal.close()
        journal = Encrypted(inner, algorithm, [NEW])  # ... then the old one is not needed
        await open_checked(journal)
        assert await journal.payloads([("ro-1", "at-1")]) == [*SPANS, newer]
        assert await journal.rows("state", ["trainer"]) == [STATE]
        await journal.close()
        with pytest.raises(StoreError, match="AGL_ENCRYPTION_KEYS has only"):
            await open_checked(Encrypted(inner, algorithm, [OLD]))

    run(test())


def test_values_after_a_change_are_closed_to_the_old_key() -> None:
    """Somebody with the old key and an old copy of the journal reads nothing that was written later."""

    async def test() -> None:
        inner = MemoryJournal()
        await filled(inner)
        [old_mark] = await inner.rows("meta", ["encryption"])
        journal = Encrypted(inner, "aes-gcm", [NEW, OLD])
        await open_checked(journal)
        await journal.write([STATE], [])
        await journal.close()
        await inner.write([old_mark], [])
        thief = Encrypted(inner, "aes-gcm", [OLD])
        await open_checked(thief)
        assert await thief.rows("rollout", ["ro-1"]) == [ROLLOUT]
        with pytest.raises(StoreError, match="without that key it cannot be read"):
            await thief.rows("state", ["trainer"])

    run(test())


@both
def test_wrong_keys_and_algorithms_are_refused_at_open(algorithm: Algorithm) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await filled(inner, algorithm)
        with pytest.raises(
            StoreError, match=r"is encrypted with the key .* AGL_ENCRYPTION_KEYS has only"
        ):
            await open_checked(Encrypted(inner, algorithm, [OTHER]))
        wrong: Algorithm = "fernet" if algorithm == "aes-gcm" else "aes-gcm"
        with pytest.raises(StoreError, match=f"set it to {algorithm}"):
            await open_checked(Encrypted(inner, wrong, [OLD]))
        journal = Encrypted(inner, algorithm, [OLD])
        await open_checked(journal)
        await has_everything(journal)

    run(test())


def test_an_encrypted_journal_is_not_opened_as_a_plain_one(tmp_path: Path) -> None:
    async def test() -> None:
        await filled(SqliteJournal(tmp_path / "store.db"))
        with pytest.raises(
            StoreError, match=r"opened without encryption; set store\.encryption as it was"
        ):
            await open_checked(SqliteJournal(tmp_path / "store.db"))
        journal = Encrypted(SqliteJournal(tmp_path / "store.db"), "aes-gcm", [OLD])
        await open_checked(journal)
        await has_everything(journal)
        await journal.close()

    run(test())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_a_plain_journal_is_not_opened_with_encryption(row: Row) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await open_checked(inner)
        await inner.write([row], [])
        with pytest.raises(StoreError, match=r"written without it; set store\.encryption to off"):
            await open_checked(Encrypted(inner, "aes-gcm", [OLD]))
        assert await inner.rows("meta", ["encryption"]) == []
        await open_checked(inner)
        assert (await inner.query(Query(row.kind))).rows == [row]

    run(test())


def test_a_first_opening_that_died_is_taken_up() -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await inner.open()  # owned, then dead before the keys were written
        await filled(inner)
        journal = Encrypted(inner, "aes-gcm", [OLD])
        await open_checked(journal)
        await has_everything(journal)

    run(test())


def test_bad_keys_are_configuration_errors_before_anything_is_opened() -> None:
    with pytest.raises(ConfigError, match="AGL_ENCRYPTION_KEYS: key 2 of 2"):
        Encrypted(MemoryJournal(), "aes-gcm", [OLD, "nonsense"])


@both
def test_tampered_and_moved_values_are_store_errors(algorithm: Algorithm) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await filled(inner, algorithm)
        [sealed] = await inner.rows("rollout", ["ro-1"])
        spans = await inner.payloads([("ro-1", "at-1")])
        event = (await inner.events(0, 1))[0]
        journal = Encrypted(inner, algorithm, [OLD])
        await open_checked(journal)
        flipped = sealed.body[:-3] + bytes([sealed.body[-3] ^ 1]) + sealed.body[-2:]
        await inner.write(
            [
                sealed._replace(body=flipped),
                sealed._replace(key="ro-2"),
                sealed._replace(key="ro-3", body=SECRET),
                sealed._replace(key="ro-4", body=b""),
            ],
            [
                spans[0]._replace(key=("ro-2", "at-1")),
                spans[0]._replace(key=("ro-3", "at-1"), first=5),
            ],
            [event._replace(number=7)],
        )
        for key in ("ro-1", "ro-2"):
            with pytest.raises(StoreError, match=f"rollout/{key}: its encrypted value was changed"):
                await journal.rows("rollout", [key])
        for key in ("ro-3", "ro-4"):
            with pytest.raises(StoreError, match=f"rollout/{key}: expected a value encrypted with"):
                await journal.rows("rollout", [key])
        for key in ("ro-2", "ro-3"):
            with pytest.raises(StoreError, match=f"spans/{key}/at-1/b1/"):
                await journal.payloads([(key, "at-1")])
        with pytest.raises(StoreError, match="event/7: its encrypted value"):
            await journal.events(6, 1)

    run(test())


@pytest.mark.parametrize("body", [b"", b"{}", b'{"algorithm": "aes-gcm", "keys": [1]}', b"\xff"])
def test_a_damaged_key_row_is_a_store_error(body: bytes) -> None:
    async def test() -> None:
        inner = MemoryJournal()
        await filled(inner)
        await inner.write([Row("meta", "encryption", 0, (), body)], [])
        with pytest.raises(StoreError, match="row of its encryption keys is damaged"):
            await open_checked(Encrypted(inner, "aes-gcm", [OLD]))

    run(test())


def test_data_keys_are_replaced_before_their_nonces_run_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encrypted, "MOST_VALUES", 5)

    async def test() -> None:
        inner = MemoryJournal()
        journal = Encrypted(inner, "aes-gcm", [OLD])
        await open_checked(journal)
        states = [Row("state", f"k{i}", 0, (), SECRET) for i in range(20)]
        for row in states:
            await journal.write([row], [])
        key_ids = {row.body[2:10] for row in (await inner.query(Query("state"))).rows}
        assert len(key_ids) == 4
        again = Encrypted(inner, "aes-gcm", [OLD])
        await open_checked(again)
        assert sorted((await again.query(Query("state"))).rows) == sorted(states)

    run(test())


def test_large_values_go_through_a_thread() -> None:
    async def test() -> None:
        inner = MemoryJournal()
        journal = Encrypted(inner, "aes-gcm", [OLD])
        await open_checked(journal)
        large = STATE._replace(body=b"x" * 3_000_000)
        span = SPANS[0]._replace(payload=b"y" * 3_000_000)
        await journal.write([large], [span])
        assert await journal.rows("state", ["trainer"]) == [large]
        assert await journal.payloads([("ro-1", "at-1")]) == [span]

    run(test())


def test_a_closed_journal_says_so() -> None:
    async def test() -> None:
        journal = Encrypted(MemoryJournal(), "aes-gcm", [OLD])
        await open_checked(journal)
        await journal.close()
        with pytest.raises(StoreError, match="not open"):
            await journal.write([STATE], [])

    run(test())
