"""The behaviour catalogue of the store on MongoDB, or on what speaks its protocol (tests/mongo_wire.py says which)."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("store_catalogue")

from store_catalogue import label, scenarios  # noqa: E402
from store_catalogue.common import Scenario  # noqa: E402
from store_catalogue.ways import go, in_process  # noqa: E402

from agl_ray.store.journals.settings import JournalSettings  # noqa: E402

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from mongo_wire import Mongo

pytest_plugins = ["mongo_wire"]


@pytest.mark.parametrize("scenario", scenarios(), ids=label)
def test_catalogue(scenario: Scenario, mongo: Mongo) -> None:
    run_id = f"test-{secrets.token_hex(6)}"
    go(scenario, in_process, mongo.url, JournalSettings(run_id=run_id))
