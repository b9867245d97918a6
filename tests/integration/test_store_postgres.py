"""The PostgreSQL journal over a real server: the contract of all journals, and what only a database can get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from journal_contract import JournalContract, Storage

from agl_ray.store.journals.base import Journal
from agl_ray.store.journals.postgres import PostgresJournal

pytest_plugins = ["services"]


class TestPostgres(JournalContract):
    @pytest.fixture
    def storage(self, postgres_url: str, run_id: str) -> Storage:
        numbers = itertools.count()

        def fresh() -> Callable[[], Journal]:
            name = f"{run_id}/{next(numbers)}"
            return lambda: PostgresJournal(postgres_url, name)

        return Storage(fresh, examples=25)
