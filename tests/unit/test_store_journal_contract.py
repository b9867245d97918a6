"""Journals that need no server, each through the whole suite of tests/journal_contract.py. The others: tests/integration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_contract import JournalContract, Storage

from agl_ray.ops.encryption import FieldCipher
from agl_ray.store.journals.base import Journal
from agl_ray.store.journals.encrypted import Encrypted
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.outside import Outside
from agl_ray.store.journals.sqlite import SqliteJournal

# SQLite's json_each ends a text at character 0; its events table forgets what was forgotten.
LIMITS: dict[str, Any] = {"any_id": False, "keeps_last_event": False}


def memory() -> Callable[[], Journal]:
    journal = MemoryJournal()
    return lambda: journal


class Files:
    """Every call is a new file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()

    def __call__(self) -> Callable[[], Journal]:
        path = self._folder / f"{next(self._numbers)}.db"
        return lambda: SqliteJournal(path)


def encrypted(make: Callable[[], Callable[[], Journal]]) -> Callable[[], Callable[[], Journal]]:
    key = FieldCipher.new_key()

    def fresh() -> Callable[[], Journal]:
        inner = make()
        return lambda: Encrypted(inner(), "aes-gcm", [key])

    return fresh


class TestMemory(JournalContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return Storage(memory, examples=80, keeps_last_event=False)


class TestSqlite(JournalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Storage(Files(tmp_path), examples=60, **LIMITS)


class TestEncryptedSqlite(JournalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Storage(encrypted(Files(tmp_path)), examples=20, exact_sizes=False, **LIMITS)


class TestSqliteWithPayloadsOutside(JournalContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        files = Files(tmp_path)

        def fresh() -> Callable[[], Journal]:
            inner, folder = files(), tmp_path / f"payloads-{next(numbers)}"
            return lambda: Outside(inner(), folder.as_uri())

        numbers = itertools.count()
        return Storage(fresh, examples=15, exact_sizes=False, **LIMITS)
