"""The store against the same simple model as in test_store_model.py, over the journals that are servers: PostgreSQL and MongoDB."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from test_store_model import StoreMachine

from agl_ray.store.journals.base import Journal
from agl_ray.store.journals.mongo import MongoJournal
from agl_ray.store.journals.postgres import PostgresJournal

if TYPE_CHECKING:
    from mongo_wire import Mongo

pytest_plugins = ["services", "mongo_wire"]
pytestmark = pytest.mark.slow


class ServerMachine(StoreMachine):
    """Each example is a run of its own on the server at `url`."""

    memory_mib = 0.008
    url = ""

    def make_journal(self) -> Journal:
        self.run_id = f"model-{secrets.token_hex(6)}"
        return self.reopened()


class PostgresMachine(ServerMachine):
    def reopened(self) -> Journal:
        return PostgresJournal(self.url, self.run_id)

    def teardown(self) -> None:
        from services import drop_run

        super().teardown()
        if hasattr(self, "run_id"):
            drop_run(self.url, self.run_id)


class MongoMachine(ServerMachine):
    def reopened(self) -> Journal:
        return MongoJournal(self.url, self.run_id, lease_seconds=60.0)


def check(machine: type[ServerMachine], url: str) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine.url = url
    few = settings(
        max_examples=3,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=few)


def test_postgres(postgres_url: str) -> None:
    check(PostgresMachine, postgres_url)


def test_mongo(mongo: Mongo) -> None:
    check(MongoMachine, mongo.url)
