"""The behaviour catalogue of the store on PostgreSQL."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("store_catalogue")

from store_catalogue import label, scenarios  # noqa: E402
from store_catalogue.common import Scenario  # noqa: E402
from store_catalogue.ways import go, in_process  # noqa: E402

from agl_ray.store.journals.settings import JournalSettings  # noqa: E402

pytestmark = pytest.mark.slow

pytest_plugins = ["services"]


@pytest.mark.parametrize("scenario", scenarios(), ids=label)
def test_catalogue(scenario: Scenario, postgres_url: str, run_id: str) -> None:
    go(scenario, in_process, postgres_url, JournalSettings(run_id=run_id))
